// Serves a SavedModel from C, without Python: loads the op library, loads the model, feeds one
// input, runs it, prints one output. A program of its own, to start from. See Makefile for how it
// is built.
//
//   ./serve MODEL_DIR INPUT SHAPE OUTPUT [OP_LIBRARY] < input.f32
//
// INPUT and OUTPUT are tensors of the signature, as "saved_model_cli show" prints them, such as
// serving_default_image:0 and StatefulPartitionedCall:0. SHAPE is the input's, such as 2,33,41,4;
// its float32 values come from standard input. OP_LIBRARY is what python -c "import tf_mdcn;
// print(tf_mdcn.op_library_path())" prints; a portable export needs none. Prints the output's shape
// in one line, then its values, one a line.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

enum { kMaxRank = 8 };

static void Fail(const char* what, const char* why) {
  fprintf(stderr, "serve: %s: %s\n", what, why);
  exit(1);
}

static void Check(const TF_Status* status, const char* what) {
  if (TF_GetCode(status) != TF_OK) Fail(what, TF_Message(status));
}

// The tensor that "operation:index" names in the graph.
static TF_Output FindTensor(TF_Graph* graph, const char* name) {
  char operation[1024];
  const char* colon = strrchr(name, ':');
  const size_t length = colon ? (size_t)(colon - name) : strlen(name);
  if (length >= sizeof(operation)) Fail(name, "the name is too long");
  memcpy(operation, name, length);
  operation[length] = '\0';
  TF_Output tensor = {TF_GraphOperationByName(graph, operation), colon ? atoi(colon + 1) : 0};
  if (tensor.oper == NULL) Fail(name, "the model has no such operation");
  if (tensor.index < 0 || tensor.index >= TF_OperationNumOutputs(tensor.oper)) {
    Fail(name, "the operation has no such output");
  }
  return tensor;
}

// A float32 tensor of the shape that "2,33,41,4" says, filled from standard input.
static TF_Tensor* ReadTensor(const char* shape) {
  int64_t dims[kMaxRank];
  int rank = 0;
  size_t count = 1;
  for (const char* text = shape; *text != '\0'; ++rank) {
    char* end;
    if (rank == kMaxRank) Fail(shape, "the shape has too many dimensions");
    dims[rank] = strtoll(text, &end, 10);
    if (end == text || dims[rank] < 0 || (*end != ',' && *end != '\0')) {
      Fail(shape, "the shape must be numbers with commas between them");
    }
    count *= (size_t)dims[rank];
    text = *end == ',' ? end + 1 : end;
  }
  TF_Tensor* tensor = TF_AllocateTensor(TF_FLOAT, dims, rank, count * sizeof(float));
  if (fread(TF_TensorData(tensor), sizeof(float), count, stdin) != count) {
    Fail("standard input", "fewer values than the shape has");
  }
  return tensor;
}

static void PrintTensor(const TF_Tensor* tensor) {
  if (TF_TensorType(tensor) != TF_FLOAT) Fail("the output", "it is not float32");
  for (int axis = 0; axis < TF_NumDims(tensor); ++axis) {
    printf("%s%lld", axis ? "," : "", (long long)TF_Dim(tensor, axis));
  }
  printf("\n");
  const float* values = (const float*)TF_TensorData(tensor);
  for (int64_t i = 0; i < TF_TensorElementCount(tensor); ++i) printf("%.9g\n", values[i]);
}

int main(int argc, char** argv) {
  if (argc != 5 && argc != 6) {
    fprintf(stderr, "usage: %s MODEL_DIR INPUT SHAPE OUTPUT [OP_LIBRARY] < input.f32\n", argv[0]);
    return 2;
  }
  TF_Status* status = TF_NewStatus();
  if (argc == 6) {
    TF_Library* library = TF_LoadLibrary(argv[5], status);
    Check(status, argv[5]);
    TF_DeleteLibraryHandle(library);  // the op stays registered
  }

  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* const tags[] = {"serve"};
  TF_Session* session =
      TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  Check(status, argv[1]);
  const TF_Output input = FindTensor(graph, argv[2]);
  const TF_Output output = FindTensor(graph, argv[4]);

  TF_Tensor* fed = ReadTensor(argv[3]);
  TF_Tensor* fetched = NULL;
  TF_SessionRun(session, NULL, &input, &fed, 1, &output, &fetched, 1, NULL, 0, NULL, status);
  Check(status, "running the model");
  PrintTensor(fetched);

  TF_DeleteTensor(fetched);
  TF_DeleteTensor(fed);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
