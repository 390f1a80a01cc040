"""What a dataset without a card is called."""

from pathlib import Path

import pytest

from vlafit.datasets.naming import name_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "place",
    [
        "lab/arm",
        "lab/arm@v3.0",
        "lab/arm@refs/pr/1",
        "hf://datasets/lab/arm",
        "hf://datasets/lab/arm@v3.0/",
        "hf://datasets/lab/arm@refs%2Fpr%2F1",
        "hf://datasets/lab/many@v3.0/robots/arm",
        "s3://bucket/robots/arm/",
        "gs://bucket/arm.hdf5",
        "https://host/robots/arm",
    ],
)
def test_a_url_or_id_gives_the_name_of_its_folder_file_or_repository(place: str):
    assert name_of(place) == "arm"


def test_a_copy_in_the_hubs_cache_has_the_name_of_its_repository(tmp_path: Path):
    snapshot = tmp_path / "datasets--lab--arm" / "snapshots" / COMMIT
    (snapshot / "left").mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert name_of(snapshot) == name_of(tmp_path / "link") == "arm"
    assert name_of(snapshot / "left") == "left"


def test_a_folder_keeps_what_follows_a_dot_and_a_file_loses_its_ending(tmp_path: Path):
    (tmp_path / "arm-v3.0").mkdir()
    (tmp_path / "pick.hdf5").touch()
    assert name_of(tmp_path / "arm-v3.0") == "arm-v3.0"
    assert name_of(tmp_path / "pick.hdf5") == "pick"
