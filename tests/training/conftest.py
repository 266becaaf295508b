"""What tests of training share."""

import pytest

from tests.helpers import tiny_data


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of ten images of 8 x 8, in colour, five of each of two classes."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_data.images(folder / "images", broken=False)
    assert tiny_data.pack(folder / "images", folder / "data") == 0
    return folder / "data"
