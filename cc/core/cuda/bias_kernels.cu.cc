// The bias and its gradient: the only kernels that see the output's layout.
#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/tuning.h"
#include "core/cuda/values.h"

namespace mdcn::cuda {
namespace {

// Distances in the output between images, pixels and channels.
struct OutputSteps {
  int64_t image, pixel, channel;
};

OutputSteps StepsOf(const Geometry& g) {
  const int64_t image = g.out_pixels * g.out_channels;
  if (g.data_format == DataFormat::kChannelsLast) return {image, g.out_channels, 1};
  return {image, 1, g.out_pixels};
}

// Element i of the output belongs to channel i / step % channels.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    BroadcastBiasKernel(const T* __restrict__ bias, int64_t count, int64_t step, int64_t channels,
                        T* __restrict__ output) {
  for (int64_t i = GridThread<int64_t>(); i < count; i += GridThreads<int64_t>()) {
    output[i] = bias[i / step % channels];
  }
}

// sums[slice][channel] = the sum over every kBiasSlices-th pixel. Neighbouring threads take
// neighbouring channels or neighbouring slices, whichever are neighbours in memory.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    SumSlicesKernel(const T* __restrict__ output_gradient, OutputSteps steps, int64_t image_pixels,
                    int64_t pixels, int64_t channels, ComputeType<T>* __restrict__ sums) {
  for (int64_t i = GridThread<int64_t>(); i < kBiasSlices * channels; i += GridThreads<int64_t>()) {
    const int64_t slice = steps.channel == 1 ? i / channels : i % kBiasSlices;
    const int64_t channel = steps.channel == 1 ? i % channels : i / kBiasSlices;
    ComputeType<T> sum = 0;
    for (int64_t pixel = slice; pixel < pixels; pixel += kBiasSlices) {
      const int64_t image = pixel / image_pixels;
      sum += ToReal(
          output_gradient[image * steps.image + (pixel - image * image_pixels) * steps.pixel +
                          channel * steps.channel]);
    }
    sums[slice * channels + channel] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    AddSlicesKernel(const ComputeType<T>* __restrict__ sums, int64_t channels,
                    T* __restrict__ bias_gradient) {
  for (int64_t channel = GridThread<int64_t>(); channel < channels;
       channel += GridThreads<int64_t>()) {
    ComputeType<T> sum = 0;
    for (int64_t slice = 0; slice < kBiasSlices; ++slice) sum += sums[slice * channels + channel];
    FromReal(sum, &bias_gradient[channel]);
  }
}

}  // namespace

template <typename T>
Status BroadcastBias(const Geometry& geometry, const T* bias, T* output, Stream stream) {
  const int64_t count = geometry.output_size();
  return LaunchThreads("BroadcastBiasKernel", BroadcastBiasKernel<T>, count, stream, bias, count,
                       StepsOf(geometry).channel, geometry.out_channels, output);
}

template <typename T>
Status BiasGradient(const Geometry& geometry, const T* output_gradient, ComputeType<T>* scratch,
                    T* bias_gradient, Stream stream) {
  const int64_t channels = geometry.out_channels;
  MDCN_RETURN_IF_ERROR(LaunchThreads("SumSlicesKernel", SumSlicesKernel<T>, kBiasSlices * channels,
                                     stream, output_gradient, StepsOf(geometry),
                                     geometry.out_pixels, geometry.batch * geometry.out_pixels,
                                     channels, scratch));
  return LaunchThreads("AddSlicesKernel", AddSlicesKernel<T>, channels, stream, scratch, channels,
                       bias_gradient);
}

int64_t BiasGradientScratchSize(const Geometry& geometry) {
  return kBiasSlices * geometry.out_channels;
}

#define MDCN_INSTANTIATE(T)                                             \
  template Status BroadcastBias(const Geometry&, const T*, T*, Stream); \
  template Status BiasGradient(const Geometry&, const T*, ComputeType<T>*, T*, Stream);
MDCN_INSTANTIATE(float)
MDCN_INSTANTIATE(double)
MDCN_INSTANTIATE(Half)
MDCN_INSTANTIATE(BFloat16)
#undef MDCN_INSTANTIATE

}  // namespace mdcn::cuda
