"""Chunks, splits, statistics, order and augmentation: what training draws from a store."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.datasets.layouts import TASKS, card, demos, in_file_order, write_libero
from vlafit.datasets import (
    ChunkDataset,
    EpisodeInfo,
    EpisodeStore,
    SampleOrder,
    arrays_for_statistics,
    draw_shifts,
    open_dataset,
    shift_image,
    shift_images,
    split_episodes,
)
from vlafit.datasets.hdf5 import Hdf5Store
from vlafit.datasets.split import describe_groups
from vlafit.errors import DataError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    shown = card(write_libero(tmp_path_factory.mktemp("data") / "set", demos()))
    return open_dataset(replace(shown, robot=replace(shown.robot, control="position")))


# --------------------------------------------------------------------------------------------------chunks


def test_samples_are_those_of_the_chosen_episodes_alone(store: EpisodeStore):
    chosen = [store.episodes[5].id, store.episodes[2].id]
    chunks = ChunkDataset([store], 2, [chosen])
    keys = [chunks[i].key for i in range(len(chunks))]
    assert keys == [("small", e, t) for e in chosen for t in range(store.episodes[store.index(e)].length)]


def test_two_stores_are_numbered_one_after_the_other(store: EpisodeStore):
    one, two = [store.episodes[0].id], [store.episodes[1].id]
    both = ChunkDataset([store, store], 2, [one, two])
    assert len(both) == store.episodes[0].length + store.episodes[1].length
    assert both[store.episodes[0].length].key == ("small", two[0], 0)


def test_a_position_out_of_range_is_an_index_error_so_that_iteration_ends(store: EpisodeStore):
    chunks = ChunkDataset([store], 2, [[store.episodes[0].id]])
    for position in (-1, len(chunks)):
        with pytest.raises(IndexError):
            chunks[position]
    assert len(list(chunks)) == len(chunks)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("chunk", "ids", "message"), [(0, ["x"], "at least one step"), (2, [], "no episodes")]
)
def test_a_dataset_without_samples_is_refused(store: EpisodeStore, chunk: int, ids: list[str], message: str):
    with pytest.raises(DataError, match=message):
        ChunkDataset([store], chunk, [ids])


# --------------------------------------------------------------------------------------------------split


@given(share=st.floats(0, 0.9), seed=st.integers(0, 1000), per_task=st.integers(0, 14))
def test_a_split_parts_whole_episodes_the_same_share_of_every_task(share: float, seed: int, per_task: int):
    store = SPLIT_STORE
    train, held_out = split_episodes(store, share, seed, per_task)
    assert not set(train) & set(held_out)
    if not per_task:
        assert len(train) + len(held_out) == len(store.episodes)
    for task in {e.task for e in store.episodes}:
        ids = {e.id for e in store.episodes if e.task == task}
        count = len(ids & set(held_out))
        assert count == (0 if share == 0 else min(max(1, round(share * 12)), 11))
        assert len(ids & set(train)) == min(12 - count, per_task or 12)
    assert split_episodes(store, share, seed, per_task) == (train, held_out)


class _Names(EpisodeStore):
    """A store of which only the episode list is used."""

    state = actions = image = close = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.episodes = tuple(EpisodeInfo(f"{t}/{i}", t, t, 3) for t in TASKS for i in range(12))


SPLIT_STORE = _Names()


def test_seeds_decide_the_split_and_the_cap_leaves_validation_alone():
    assert split_episodes(SPLIT_STORE, 0.3, 0) != split_episodes(SPLIT_STORE, 0.3, 1)
    train, held_out = split_episodes(SPLIT_STORE, 0.3, 0)
    few, same = split_episodes(SPLIT_STORE, 0.3, 0, per_task=2)
    assert same == held_out and set(few) < set(train) and len(few) == 4


def test_training_episodes_of_a_smaller_cap_are_among_those_of_a_larger():
    few, more = (split_episodes(SPLIT_STORE, 0.3, 0, per_task=n)[0] for n in (2, 5))
    assert set(few) < set(more)


def one_file_each(*sentences: str) -> EpisodeStore:
    """Episodes as a layout lists them that names the task after the file, with one episode in each."""
    store = _Names()
    store.episodes = tuple(EpisodeInfo(f"log_{n}", f"log_{n}", text, 3) for n, text in enumerate(sentences))
    return store


def test_files_of_one_episode_with_one_instruction_are_one_task():
    store = one_file_each(*["fold"] * 10, *["open"] * 10, "wave")
    for seed in range(5):
        train, held_out = split_episodes(store, 0.2, seed)
        sentences = [store.episodes[store.index(i)].instruction for i in held_out]
        assert Counter(sentences) == {"fold": 2, "open": 2}
        assert {*train} | {*held_out} == {info.id for info in store.episodes} and "log_20" in train
    few, same = split_episodes(store, 0.2, 0, per_task=3)
    assert len(few) == 7 and same == split_episodes(store, 0.2, 0)[1]
    said = "21 of 21 tasks have one episode (log_0, log_1, log_2, ...): 20 of them share instructions"
    assert describe_groups(store).startswith(said)
    assert describe_groups(store).endswith("; 1 has an instruction of its own, and is trained on")
    own = "): 3 have instructions of their own: data.validation holds out a share of these episodes"
    assert own in describe_groups(one_file_each("fold", "open", "wave"))


@given(count=st.integers(1, 40), share=st.floats(0.0, 0.9), seed=st.integers(0, 99))
def test_tasks_that_are_one_episode_each_are_split_as_episodes(count: int, share: float, seed: int):
    store = one_file_each(*map(str, range(count)))
    train, held_out = split_episodes(store, share, seed, per_task=1)
    assert len(held_out) == min(round(share * count), count - 1) and len(train) == count - len(held_out)
    assert not {*train} & {*held_out}


def test_single_episodes_change_nothing_for_tasks_that_have_several():
    store = _Names()
    alone = EpisodeInfo("alone", "alone", "alone", 3), EpisodeInfo("other", "other", "other", 3)
    store.episodes = (*SPLIT_STORE.episodes, *alone)
    before, after = split_episodes(SPLIT_STORE, 0.2, 0), split_episodes(store, 0.2, 0)
    assert after == ((*before[0], "alone", "other"), before[1])
    assert describe_groups(SPLIT_STORE) == ""


@pytest.mark.parametrize(("share", "per_task"), [(1.0, 0), (-0.1, 0), (0.1, -1)])
def test_an_impossible_split_is_refused(share: float, per_task: int):
    with pytest.raises(DataError):
        split_episodes(SPLIT_STORE, share, 0, per_task)


# --------------------------------------------------------------------------------------------------statistics


def test_statistics_never_touch_an_image_nor_an_episode_outside_training(
    store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
):
    train, held_out = split_episodes(store, 0.3, 0)

    def refuse(*_: object) -> None:
        raise AssertionError("an image was read")

    read: list[int] = []
    real = Hdf5Store.actions
    monkeypatch.setattr(Hdf5Store, "image", refuse)
    monkeypatch.setattr(Hdf5Store, "actions", lambda self, e: (read.append(e), real(self, e))[1])
    states, actions = arrays_for_statistics(store, train, 4)
    frames = sum(store.episodes[store.index(i)].length for i in train)
    assert states.shape == (frames, 5) and actions.shape == (frames, 4)
    assert set(read) == {store.index(i) for i in train}
    assert not set(read) & {store.index(i) for i in held_out}


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_relative_windows_are_the_real_steps_of_every_chunk_minus_its_first_state(
    store: EpisodeStore, chunk: int
):
    ids, relative = [e.id for e in store.episodes[:3]], (True, False, False, True)
    _, windows = arrays_for_statistics(store, ids, chunk, relative)
    chunks = ChunkDataset([store], chunk, [ids])
    expected = []
    for sample in chunks:  # type: ignore[attr-defined]
        difference = sample.actions - np.where(relative, sample.observation.state[:4], 0)
        expected.append(difference[sample.is_real])
    expected = np.concatenate(expected)
    order = [np.lexsort(a.T) for a in (windows, expected)]
    np.testing.assert_allclose(windows[order[0]], expected[order[1]], atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "relative", "message"),
    [(0, (), "no episodes"), (1, (True,), "1 entries for 4"), (1, (True, False) * 3, "6 entries for 4")],
)
def test_statistics_that_cannot_be_are_refused(
    store: EpisodeStore, ids: int, relative: tuple[bool, ...], message: str
):
    with pytest.raises(DataError, match=message):
        arrays_for_statistics(store, [e.id for e in store.episodes[:ids]], 3, relative)


# --------------------------------------------------------------------------------------------------order


@given(size=st.integers(1, 30), batch=st.integers(1, 40), step=st.integers(0, 50), seed=st.integers(0, 99))
def test_a_batch_is_a_function_of_seed_and_step_whatever_was_asked_before(
    size: int, batch: int, step: int, seed: int
):
    order = SampleOrder(size, seed)
    from_start = [order.batch(k, batch) for k in range(step + 1)]
    assert SampleOrder(size, seed).batch(step, batch) == from_start[step]
    stream = [pair for one in from_start for pair in one]
    for epoch in range(len(stream) // size):
        part = stream[epoch * size : (epoch + 1) * size]
        assert {e for e, _ in part} == {epoch}
        assert sorted(i for _, i in part) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    one = SampleOrder(100, 0)
    assert one.batch(0, 100) != [(0, i) for _, i in one.batch(1, 100)]
    assert one.batch(0, 100) != SampleOrder(100, 1).batch(0, 100)


def test_the_batch_size_does_not_change_the_stream():
    order = SampleOrder(10, 3)
    assert order.batch(0, 12) == order.batch(0, 4) + order.batch(1, 4) + order.batch(2, 4)


def test_an_order_of_nothing_is_refused():
    with pytest.raises(DataError, match="no samples"):
        SampleOrder(0, 0)


# ---------------------------------------------------------------------------------------------- augmentation


@given(dy=st.integers(-9, 9), dx=st.integers(-9, 9), flip=st.booleans())
def test_a_shift_is_a_crop_of_the_image_with_its_edges_repeated(dy: int, dx: int, flip: bool):
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = image[::-1, ::-1] if flip else image
    padded = np.pad(image, ((9, 9), (9, 9), (0, 0)), mode="edge")
    expected = padded[9 - dy : 15 - dy, 9 - dx : 14 - dx]
    np.testing.assert_array_equal(shift_image(image, dy, dx), expected)


def test_draws_belong_to_seed_epoch_and_sample_and_cover_the_whole_range():
    draws = np.stack([draw_shifts(0, 0, i, 2, 2) for i in range(300)])
    assert set(np.unique(draws)) == {-2, -1, 0, 1, 2}
    np.testing.assert_array_equal(draws[7], draw_shifts(0, 0, 7, 2, 2))
    for other in (draw_shifts(1, 0, 7, 8, 50), draw_shifts(0, 1, 7, 8, 50), draw_shifts(0, 0, 8, 8, 50)):
        assert (other != draw_shifts(0, 0, 7, 8, 50)).any()


def test_neighbouring_samples_and_cameras_are_shifted_independently():
    draws = np.stack([draw_shifts(0, 0, i, 2, 100) for i in range(2000)]).reshape(2000, 4)
    following = np.concatenate([draws[:-1], draws[1:]], axis=1)
    correlation = np.corrcoef(following.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.1


def test_a_shifted_sample_is_the_same_sample_with_moved_images(store: EpisodeStore):
    sample = ChunkDataset([store], 3, [[store.episodes[0].id]])[1]
    moved = shift_images(sample, 3, seed=0, epoch=1, index=1)
    shifts = draw_shifts(0, 1, 1, 2, 3).tolist()
    for (name, image), (dy, dx) in zip(sorted(sample.observation.images.items()), shifts, strict=True):
        np.testing.assert_array_equal(moved.observation.images[name], shift_image(image, dy, dx))
    assert moved.key == sample.key and moved.actions is sample.actions
    with pytest.raises(DataError, match="0 or more pixels"):
        shift_images(sample, -1, seed=0, epoch=0, index=0)


def test_samples_match_the_demonstrations_that_were_written(store: EpisodeStore):
    expected = in_file_order(demos())
    assert [store.state(i).shape for i in range(24)] == [d.state.shape for d in expected]


# --------------------------------------------------------------------------------------------------all of it


def test_a_recording_goes_through_the_codec_and_back(store: EpisodeStore, tmp_path: Path):
    from vlafit.codec import Codec, CodecConfig, train_word_tokenizer

    train, _ = split_episodes(store, 0.1, 0)
    relative = (True, True, False, False)
    states, windows = arrays_for_statistics(store, train, 4, relative)
    config = CodecConfig(("wrist", "front"), 8, 8, 8, 4, relative=relative, max_tokens=20)
    tokenizer = train_word_tokenizer([e.instruction for e in store.episodes], 300)
    codec = Codec.fit(config, store.embodiment, states, windows, tokenizer)
    chunks = ChunkDataset([store], 4, [train])
    for position in range(0, len(chunks), 7):
        sample = chunks[position]
        encoded = codec.encode(sample)
        assert encoded.actions is not None
        again = codec.decode(encoded.actions, sample.observation)
        np.testing.assert_allclose(again.actions, sample.actions, atol=1e-5)
