"""What all tests share. Separate because pytest looks for it here."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def outside_of_the_sources(tmp_path_factory):
    """Fresh processes import the installed package, not the sources in the current folder."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("outside"))
    yield
    os.chdir(before)
