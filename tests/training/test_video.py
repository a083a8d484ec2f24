"""Clips: the frames that are picked, folders and annotation lists with every mistake, networks on clips."""

import random

import pytest
import torch
from torch import nn

from training import engine
from training.config import ConfigError, DataConfig, from_tables, load
from training.data import load_data, synthetic_video
from training.data.clips import pick_frames
from training.data.sources import DataError
from training.data.video import Clip, read_annotations
from training.models import build_model


@pytest.mark.parametrize(("frames", "segments"), [(4, 4), (5, 4), (17, 16), (100, 3), (1, 1), (300, 16)])
def test_one_frame_of_each_segment(frames, segments):
    edges = [frames * k / segments for k in range(segments + 1)]
    for chance in (None, *(random.Random(seed) for seed in range(50))):
        picked = pick_frames(frames, segments, chance)
        assert len(set(picked)) == segments
        for k, frame in enumerate(picked):
            assert edges[k] - 1 < frame < edges[k + 1]
    assert pick_frames(9, 3, None) == [1, 4, 7]
    assert {tuple(pick_frames(4, 2, random.Random(seed))) for seed in range(50)} == {(0, 2), (0, 3), (1, 2), (1, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 training and 6 test clips of 12 frames of 16x16."""
    path = tmp_path_factory.mktemp("video")
    synthetic_video.main([str(path), "--train", "20", "--test", "6"])
    return path


def config(folder, **changes):
    return DataConfig("video", root=str(folder), image_size=16, segments=4, **changes)


def test_clips_of_folders(folder):
    data = load_data(config(folder, augment=False))
    source = load_data(DataConfig("synthetic_digit_clips", segments=4))
    assert data.num_classes == 10 and len(data.train.labels) == 20 and len(data.test.labels) == 6
    batch, labels = data.train.train_batch(torch.arange(20), 3, slice(0, 20))
    assert batch.shape == (20, 4, 3, 16, 16) and torch.equal(labels, source.train.labels[:20])
    again = load_data(config(folder, augment=False, workers=1)).train
    assert torch.equal(again.train_batch(torch.arange(20), 3, slice(5, 9))[0], batch[5:9])
    assert not torch.equal(again.train_batch(torch.arange(20), 4, slice(0, 20))[0], batch)
    data.train.keep(torch.tensor([7, 3]))
    assert data.train.labels.tolist() == labels[[7, 3]].tolist() and len(data.train.clips) == 2


def test_frames_come_in_order_and_whole(folder):
    clips = load_data(DataConfig("synthetic_digit_clips", segments=4)).test
    data = load_data(config(folder)).test
    data.size = 14  # the centre that is cut out of 16 pixels: nothing is interpolated
    frames = clips.frames(2, [1, 4, 7, 10])[:, :, 1:15, 1:15].expand(-1, 3, -1, -1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(data.eval_batch(torch.tensor([2]))[0][0], (frames / 255 - mean) / std)


def test_a_clip_has_one_crop_for_all_its_frames(tmp_path):
    (tmp_path / "still").mkdir()
    picture = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
    for frame in range(6):
        synthetic_video.Image.fromarray(picture).save(tmp_path / "still" / f"{frame}.png")
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("still 6 0\n")
    data = load_data(config(tmp_path))
    first, _ = data.train.train_batch(torch.tensor([0]), 1, slice(0, 1))
    second, _ = data.train.train_batch(torch.tensor([0]), 2, slice(0, 1))
    assert all(torch.equal(frame, first[0, 0]) for frame in first[0])
    assert not torch.equal(first, second)


def test_both_kinds_of_lists(tmp_path):
    (tmp_path / "list.txt").write_text("clips/a b/c 250 0\n\nv_abc,117,23,4\n")
    assert read_annotations(tmp_path / "list.txt", tmp_path) == [
        Clip(tmp_path / "clips/a b/c", 250, 0),
        Clip(tmp_path / "v_abc", 117, 23),
    ]


@pytest.mark.parametrize("line", ["clip", "clip 12", "clip twelve 0", "clip 12 0.5", "clip 12 -1", "clip,12"])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"clip 12 0\n{line}\n")
    with pytest.raises(DataError, match=rf"list\.txt, line 2: '{line}' cannot be read; expected is one line a clip"):
        read_annotations(tmp_path / "list.txt", tmp_path)


def spoil_list(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "val.txt").unlink(),
            r"the annotation list .*val\.txt is missing; write it, one line",
        ),
        (spoil_list("train.txt", "\n"), r"the annotation list .*train\.txt is empty"),
        (spoil_list("train.txt", "one 3 0\n"), r"one has 3 frames, data\.segments = 4 needs as many: lower data\.seg"),
        (spoil_list("train.txt", "one 8 0\n"), r"one has 6 images \(.*\), .*train\.txt says 8 frames: extract its"),
        (spoil_list("train.txt", "two 6 0\n"), r"two, a clip of .*train\.txt, cannot be read: No such file.*; extract"),
        (spoil_list("val.txt", "one 6 1\n"), r"one has label 1 in .*val\.txt, but the labels of .* end at 0"),
    ],
)
def test_mistakes_are_found_before_anything_trains(tmp_path, spoil, message):
    (tmp_path / "one").mkdir()
    for frame in range(6):
        synthetic_video.Image.new("RGB", (20, 20)).save(tmp_path / "one" / f"{frame}.png")
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("one 6 0\n")
    load_data(config(tmp_path))
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path))


def test_a_corrupt_frame_is_named(tmp_path):
    synthetic_video.main([str(tmp_path), "--train", "2", "--test", "1"])
    frame = tmp_path / "clips/train-00001/00001.png"
    frame.write_bytes(frame.read_bytes()[:60])
    data = load_data(config(tmp_path))
    with pytest.raises(DataError, match=r"train-00001/00001\.png cannot be read as an image: .*; replace it"):
        data.train.eval_batch(torch.arange(2))


def test_synthetic_clips_are_the_same_each_time_and_show_their_image():
    one, other = (load_data(DataConfig("synthetic_digit_clips", segments=3)).train for _ in range(2))
    indices = torch.tensor([5, 900, 17])
    assert torch.equal(one.eval_batch(indices)[0], other.eval_batch(indices)[0])
    other.keep(indices)
    assert torch.equal(other.frames(1, [4, 0]), one.frames(900, [4, 0]))
    assert not torch.equal(one.train_batch(indices, 1, slice(0, 3))[0], one.train_batch(indices, 2, slice(0, 3))[0])
    places = set()
    for frame in one.frames(900, list(range(synthetic_video.FRAMES))):
        fits = (frame.unfold(1, 8, 1).unfold(2, 8, 1)[0] >= one.images[900, 0]).all(-1).all(-1)
        assert fits.any(), "the digit is somewhere in the frame"
        places.add(tuple(fits.nonzero()[0].tolist()))
    assert len(places) > 1, "and moves"


def test_too_many_segments_for_a_synthetic_clip():
    with pytest.raises(ConfigError, match=r"data\.segments must be at most 12, .*, got 13"):
        load_data(DataConfig("synthetic_digit_clips", segments=13))


@pytest.mark.parametrize("depth", [18, 50])
def test_logits_of_a_clip_are_the_mean_over_its_frames(depth):
    options = {"stem": "cifar", "width": 0.125}
    clips, frames = build_model(f"video_resnet{depth}", 5, **options), build_model(f"resnet{depth}", 5, **options)
    clips.load_state_dict(frames.state_dict())
    x = torch.randn(2, 3, 3, 16, 16)
    with torch.no_grad():
        expected = torch.stack([frames.eval()(clip).mean(0) for clip in x])
        torch.testing.assert_close(clips.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(clips.fc, nn.Linear)


def test_training_on_a_folder_of_clips(folder, tmp_path):
    tables = {
        "model": {"name": "video_resnet18", "stem": "cifar", "width": 0.06},
        "data": {"name": "video", "root": str(folder), "image_size": 16, "segments": 2, "batch_size": 10},
        "run": {"epochs": 1},
    }
    result = engine.run(from_tables(tables), tmp_path / "run")
    assert result.metrics[-1]["step"] == 2 and 0 <= result.accuracy <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["float", "minmax-pact"])
def test_small_video_recipes_beat_chance_by_far(tmp_path, method):
    assert engine.run(load(f"video-small/{method}"), tmp_path / "run").accuracy > 0.6


@pytest.mark.slow
def test_an_adaptive_network_trains_on_clips(tmp_path):
    data = ["name=synthetic_digit_clips", "segments=2", "subset=40", "batch_size=20"]
    changes = ["model.stem=cifar", "model.width=0.0625", 'model.init=""', "run.epochs=1", *(f"data.{d}" for d in data)]
    result = engine.run(load("coquant/table3/activitynet-resnet18-coquant", changes), tmp_path / "run")
    final = result.metrics[-1]
    assert set(final["results"]) == {f"{bits} bits" for bits in range(2, 9)}
    assert sum(final["algorithm"]["teachers"]["2"].values()) == 2  # one choice a step
