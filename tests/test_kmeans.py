"""k-means: exact labels, sums that add up, starts, training on streams, and the peers it has to match."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from common import kmeans_steps
from common.kmeans import (
    ClusterSums,
    as_estimator,
    assign,
    best_precision,
    fixed_blocks,
    kmeans_plus_plus,
    lloyd_passes,
    partial_sums,
    sample_rows,
    train_cuml,
    train_lloyd,
    train_minibatch,
    update_centroids,
    warm_start,
)


def make_blobs(n_rows: int, *, n_blobs: int, n_dimensions: int = 16, width: float = 0.15, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((n_blobs, n_dimensions))
    blob = rng.choice(n_blobs, size=n_rows, p=rng.dirichlet(np.full(n_blobs, 2.0)))
    return (means[blob] + width * rng.standard_normal((n_rows, n_dimensions))).astype(np.float32)


def stream(vectors: np.ndarray, *, n_rows: int = 1000) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: (vectors[start : start + n_rows] for start in range(0, len(vectors), n_rows))


def total_inertia(vectors: np.ndarray, centroids: np.ndarray) -> float:
    return float(assign(vectors, centroids)[1].sum(dtype=np.float64))


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    return make_blobs(20_000, n_blobs=80)


# ---- assign --------------------------------------------------------------------------------------------------------


def test_assign_by_hand() -> None:
    centroids = np.array([[0, 0], [4, 0], [0, 0]], np.float32)
    labels, distances = assign(np.array([[1, 0], [3, 1], [2, 0], [0, 0]], np.float32), centroids)
    assert labels.tolist() == [0, 1, 0, 0]  # [2, 0] is as near to 0 as to 1, and centroid 2 repeats 0: lowest wins
    assert distances.tolist() == [1, 2, 4, 0]
    assert labels.dtype == np.int32
    assert distances.dtype == np.float32


@pytest.mark.parametrize("n_clusters", [1, 3, 100, 2000])
def test_assign_equals_scikit_learn(blobs, n_clusters) -> None:
    centroids = blobs[:n_clusters] + np.float32(0.01)
    labels, distances = assign(blobs, centroids)
    assert np.array_equal(labels, as_estimator(centroids).predict(blobs))
    exact = np.square(blobs.astype(np.float64) - centroids[labels]).sum(axis=1)
    np.testing.assert_allclose(distances, exact, rtol=1e-5)


def test_assign_takes_distances_from_residuals() -> None:
    far = np.full((1, 8), 1000, np.float32)
    assert assign(far + np.float32(0.25), far)[1][0] == 8 * 0.25**2  # |x|^2 - 2 x.c + |c|^2 would give 0 here


def test_assign_does_not_depend_on_threads_or_tiles(blobs, monkeypatch) -> None:
    expected = assign(blobs, blobs[:300], n_threads=1)
    monkeypatch.setattr(kmeans_steps, "TILE_SCORES", 1 << 15)
    for n_threads in (1, 2, 5):
        got = assign(blobs, blobs[:300], n_threads=n_threads)
        assert np.array_equal(got[0], expected[0])
        assert np.array_equal(got[1], expected[1])


def test_assign_of_no_rows() -> None:
    labels, distances = assign(np.empty((0, 3), np.float32), np.ones((2, 3), np.float32))
    assert labels.shape == distances.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_assign_refuses_rows_that_are_not_finite(bad) -> None:
    vectors = np.ones((5, 3), np.float32)
    vectors[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 5 rows"):
        assign(vectors, np.zeros((2, 3), np.float32))


def test_assign_refuses_another_dimension() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) do not fit centroids of shape \(2, 5\)"):
        assign(np.ones((4, 3), np.float32), np.ones((2, 5), np.float32))


# ---- map and reduce ------------------------------------------------------------------------------------------------


def test_partial_sums_by_hand() -> None:
    centroids = np.array([[0, 0], [10, 0], [99, 99]], np.float32)
    sums = partial_sums(np.array([[1, 0], [0, 2], [10, 3], [12, 0]], np.float32), centroids)
    assert sums.sums.tolist() == [[1, 2], [22, 3], [0, 0]]
    assert sums.counts.tolist() == [2, 2, 0]
    assert sums.cluster_inertia.tolist() == [5, 13, 0]
    assert (sums.inertia, sums.n_rows) == (18, 4)
    assert sums.worst_rows.tolist() == [[10, 3], [0, 2], [12, 0], [1, 0]]  # 9, 4, 4, 1: equal ones in row order


def test_merged_parts_equal_the_whole(blobs) -> None:
    centroids = blobs[:50]
    whole = partial_sums(blobs, centroids)
    parts = [partial_sums(part, centroids) for part in np.split(blobs, [7, 4000, 15_000])]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=0, atol=1e-9)
    np.testing.assert_allclose(merged.cluster_inertia, whole.cluster_inertia, rtol=1e-12)
    assert np.array_equal(merged.counts, whole.counts)
    assert np.array_equal(merged.worst_rows, whole.worst_rows)
    assert np.array_equal(update_centroids(merged, centroids), update_centroids(whole, centroids))


def test_sums_keep_float64_digits() -> None:
    vectors = np.full((100_000, 1), 0.1, np.float32)
    sums = partial_sums(vectors, np.zeros((1, 1), np.float32)).sums[0, 0]
    assert sums == pytest.approx(100_000 * float(np.float32(0.1)), rel=1e-12)
    in_float32 = np.cumsum(vectors, dtype=np.float32)[-1]
    assert in_float32 != pytest.approx(sums, rel=1e-6)  # what a float32 sum would have lost


def test_map_labels_rows_far_from_the_origin() -> None:
    near_origin = make_blobs(2000, n_blobs=10)
    shifted, centroids = near_origin + np.float32(4096), near_origin[:10] + np.float32(4096)
    exact = np.square(shifted[:, None].astype(np.float64) - centroids).sum(axis=2).argmin(axis=1)
    counts = np.bincount(exact, minlength=10)
    assert np.array_equal(partial_sums(shifted, centroids).counts, counts)
    assert not np.array_equal(np.bincount(assign(shifted, centroids)[0], minlength=10), counts)  # float32 as it comes


def test_update_takes_means_and_long_steps() -> None:
    centroids = np.array([[0, 0], [10, 0]], np.float32)
    sums = partial_sums(np.array([[1, 0], [3, 2], [10, 4]], np.float32), centroids)
    assert update_centroids(sums, centroids).tolist() == [[2, 1], [10, 4]]
    assert update_centroids(sums, centroids, step=1.5).tolist() == [[3, 1.5], [10, 6]]


def test_empty_clusters_move_to_the_farthest_rows() -> None:
    vectors = np.array([[0, 0], [1, 0], [8, 0], [9, 0], [9, 0], [0, 7]], np.float32)
    centroids = np.array([[0, 0], [50, 50], [60, 60]], np.float32)
    updated = update_centroids(partial_sums(vectors, centroids), centroids)
    assert updated[1:].tolist() == [[9, 0], [0, 7]]  # not [9, 0] twice, nor its neighbour [8, 0]


def test_an_empty_cluster_stays_when_no_row_is_left_for_it() -> None:
    centroids = np.array([[1, 1], [5, 5]], np.float32)
    updated = update_centroids(partial_sums(np.ones((3, 2), np.float32), centroids), centroids)
    assert updated.tolist() == [[1, 1], [5, 5]]


def test_spherical_step_is_about_direction_alone() -> None:
    vectors = np.array([[3, 0], [0, 5], [0, 0]], np.float32)
    centroids = np.array([[1, 0]], np.float32)
    sums = partial_sums(vectors, centroids, spherical=True)
    assert sums.sums.tolist() == [[1, 1]]  # unit rows; the zero row stays zero
    np.testing.assert_allclose(update_centroids(sums, centroids, spherical=True), [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_bf16_products_fit_as_well(blobs) -> None:
    exact = partial_sums(blobs, blobs[:80])
    rounded = partial_sums(blobs, blobs[:80], precision="bf16")
    assert rounded.n_rows == exact.n_rows
    assert exact.inertia * (1 - 1e-6) <= rounded.inertia <= exact.inertia * 1.01


def test_best_precision_is_bf16_only_with_amx_or_a_gpu(monkeypatch) -> None:
    for has_amx, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(kmeans_steps, "cpu_has_amx", lambda has_amx=has_amx: has_amx)
        assert best_precision("cpu") == expected
    assert best_precision("cuda") == "bf16"


# ---- samples and seeds ---------------------------------------------------------------------------------------------


def test_fixed_blocks_cut_any_stream_alike() -> None:
    rows = np.arange(25, dtype=np.float32).reshape(25, 1)
    for cuts in ([], [1, 2, 3], [5, 5, 17], [10, 20]):
        blocks = list(fixed_blocks(np.split(rows, cuts), n_rows=10))
        assert [len(block) for block in blocks] == [10, 10, 5]
        assert np.array_equal(np.concatenate(blocks), rows)


def test_fixed_blocks_outlive_the_buffer_of_the_stream() -> None:
    def reused() -> Iterator[np.ndarray]:
        buffer = np.empty((3, 1), np.float32)
        for value in range(4):
            buffer[:] = value
            yield buffer

    assert (
        np.concatenate(list(fixed_blocks(reused(), n_rows=5))).ravel().tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )


def test_sample_depends_on_the_seed_and_not_on_the_cuts() -> None:
    rows = np.arange(5000, dtype=np.float32).reshape(-1, 1)
    samples = [sample_rows(stream(rows, n_rows=n), n_rows=300, rng=np.random.default_rng(3)) for n in (1, 77, 5000)]
    assert np.array_equal(samples[0], samples[1])
    assert np.array_equal(samples[0], samples[2])
    assert len(np.unique(samples[0])) == 300
    other = sample_rows(stream(rows), n_rows=300, rng=np.random.default_rng(4))
    assert not np.array_equal(samples[0], other)


def test_sample_is_uniform_and_so_is_its_prefix() -> None:
    rows = np.arange(100, dtype=np.float32).reshape(-1, 1)
    rng = np.random.default_rng(0)
    taken = np.concatenate([sample_rows(stream(rows, n_rows=9), n_rows=20, rng=rng)[:5] for _ in range(2000)])
    counts = np.bincount(taken.ravel().astype(int), minlength=100)  # 100 expected each, standard deviation 9.7
    assert counts.sum() == 10_000
    assert np.abs(counts - 100).max() < 45
    assert abs(counts[:50].sum() - 5000) < 200


def test_sample_of_a_short_or_empty_stream() -> None:
    rows = np.arange(7, dtype=np.float32).reshape(-1, 1)
    assert sorted(sample_rows(stream(rows), n_rows=50, rng=np.random.default_rng(0)).ravel()) == list(range(7))
    with pytest.raises(ValueError, match="empty"):
        sample_rows(stream(rows[:0]), n_rows=50, rng=np.random.default_rng(0))


def test_seeds_are_as_good_as_scikit_learns(blobs) -> None:
    from sklearn.cluster import kmeans_plusplus

    rows = blobs[:5000]
    ours = [total_inertia(rows, kmeans_plus_plus(rows, n_clusters=80, rng=np.random.default_rng(s))) for s in range(8)]
    peer = [total_inertia(rows, kmeans_plusplus(rows, 80, random_state=s)[0]) for s in range(8)]
    assert np.mean(ours) == pytest.approx(np.mean(peer), rel=0.06)
    at_random = [total_inertia(rows, rows[start : start + 80]) for start in range(0, 800, 100)]
    assert np.mean(at_random) > 1.3 * np.mean(peer)  # the comparison can fail


def test_seeds_from_one_pool_follow_squared_distances() -> None:
    """After 8 seeds at 0, two more among -8, 10 and 11 come from one pool; the chance of each pair is worked out."""
    rows = np.array([[0]] * 8 + [[-8], [10], [11]], np.float32)
    rng = np.random.default_rng(0)
    seeds = [kmeans_plus_plus(rows, n_clusters=10, rng=rng, initial=rows[:8], n_trials=1)[8:] for _ in range(2000)]
    pairs = [tuple(sorted(pair.ravel())) for pair in seeds]
    # squared distances 64, 100, 121 at first; after -8 they are 0, 100, 121; after 10: 64, 0, 1; after 11: 64, 1, 0
    expected = {
        (10, 11): 100 / 285 * 1 / 65 + 121 / 285 * 1 / 65,
        (-8, 10): 100 / 285 * 64 / 65 + 64 / 285 * 100 / 221,
        (-8, 11): 121 / 285 * 64 / 65 + 64 / 285 * 121 / 221,
    }
    for pair, chance in expected.items():
        assert np.mean([drawn == pair for drawn in pairs]) == pytest.approx(chance, abs=0.04 if -8 in pair else 0.01)


def test_seeds_keep_what_is_given_and_add_what_is_far() -> None:
    rows = np.array([[0, 0], [0, 1], [50, 0], [50, 1]], np.float32)
    seeds = kmeans_plus_plus(rows, n_clusters=2, rng=np.random.default_rng(0), initial=rows[:1])
    assert seeds[0].tolist() == [0, 0]
    assert seeds[1, 0] == 50


def test_seeds_of_fewer_different_rows_than_clusters() -> None:
    rows = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    seeds = kmeans_plus_plus(rows, n_clusters=6, rng=np.random.default_rng(0))
    assert {tuple(seed) for seed in seeds} == {tuple(row) for row in np.eye(3)}
    with pytest.raises(ValueError, match="13 clusters need at least as many rows, and there are 12"):
        kmeans_plus_plus(rows, n_clusters=13, rng=np.random.default_rng(0))


def test_relocation_finds_every_blob() -> None:
    vectors = make_blobs(12_000, n_blobs=60, width=0.05, seed=2)
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    ideal = 12_000 * 16 * 0.05**2
    reached = {}
    for n_relocations in (0, 4):
        starts = [
            warm_start(vectors, n_clusters=60, rng=np.random.default_rng(s), n_relocations=n_relocations)
            for s in range(2)
        ]
        reached[n_relocations] = [total_inertia(vectors, start) / ideal for start in starts]
    assert max(reached[4]) < 1.01
    assert max(reached[0]) > 1.1  # Lloyd alone leaves two blobs under one centroid


# ---- training ------------------------------------------------------------------------------------------------------


def check_result(result, vectors: np.ndarray) -> None:
    labels, distances = assign(vectors, result.centroids)
    assert np.array_equal(result.sizes, np.bincount(labels, minlength=len(result.centroids)))
    np.testing.assert_allclose(
        result.cluster_inertia,
        np.bincount(labels, weights=distances, minlength=len(result.sizes)),
        rtol=1e-4,
        atol=1e-3,
    )
    assert result.centroids.dtype == np.float32


def test_lloyd_matches_scikit_learn(blobs) -> None:
    from sklearn.cluster import KMeans

    result = train_lloyd(stream(blobs), n_clusters=100)
    check_result(result, blobs)
    peer = KMeans(100, n_init=1, random_state=0).fit(blobs)
    assert result.inertia <= 1.01 * peer.inertia_
    assert all(
        later <= earlier * (1 + 1e-9) for earlier, later in zip(result.history, result.history[1:], strict=False)
    )


@pytest.mark.parametrize("train", [train_lloyd, train_minibatch])
def test_same_seed_same_bytes_however_the_stream_is_cut(train) -> None:
    vectors = make_blobs(6000, n_blobs=30)
    first = train(stream(vectors, n_rows=6000), n_clusters=20, random_state=5)
    again = train(stream(vectors, n_rows=77), n_clusters=20, random_state=5)
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.history == again.history
    other = train(stream(vectors), n_clusters=20, random_state=6)
    assert first.centroids.tobytes() != other.centroids.tobytes()


@pytest.mark.parametrize("train", [train_lloyd, train_minibatch])
def test_max_epochs_counts_passes(train) -> None:
    vectors = make_blobs(20_000, n_blobs=200, width=0.6)
    n_opened = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal n_opened
        n_opened += 1
        return stream(vectors)()

    result = train(counted, n_clusters=50, max_epochs=2, tol=0, init_size=2000)
    assert (result.n_passes, result.converged) == (2, False)
    assert n_opened == 2 + 2  # and one to sample, one to measure
    assert len(result.history) == 3


def test_lloyd_stops_when_inertia_hardly_falls(blobs) -> None:
    result = train_lloyd(stream(blobs), n_clusters=20, max_epochs=50, tol=1e-2)
    assert result.converged
    assert result.n_passes < 10


def test_polish_starts_from_given_centroids(blobs) -> None:
    measured = train_lloyd(stream(blobs), n_clusters=40, init=blobs[:40], max_epochs=0)
    assert np.array_equal(measured.centroids, blobs[:40])
    assert measured.inertia == pytest.approx(total_inertia(blobs, blobs[:40]), rel=1e-5)
    polished = train_lloyd(stream(blobs), n_clusters=40, init=blobs[:40], max_epochs=3)
    assert polished.inertia < 0.9 * measured.inertia


@pytest.mark.parametrize("init", ["nested", "k-means++", "random"])
def test_every_start_trains(blobs, init) -> None:
    result = train_lloyd(stream(blobs), n_clusters=10, init=init, max_epochs=3)
    check_result(result, blobs)


def test_spherical_clusters_by_cosine() -> None:
    rng = np.random.default_rng(0)
    directions = np.eye(3, 8, dtype=np.float32)[rng.integers(3, size=900)]
    vectors = (directions + 0.05 * rng.standard_normal((900, 8))) * rng.uniform(0.1, 50, (900, 1))
    result = train_lloyd(stream(vectors.astype(np.float32)), n_clusters=3, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, rtol=1e-6)
    assert sorted(result.centroids[:, :3].argmax(axis=1)) == [0, 1, 2]
    assert result.centroids[:, :3].max(axis=1).min() > 0.99


def test_lloyd_passes_take_any_map(blobs) -> None:
    """Shards mapped one by one and merged in order: the way a stage calls it."""
    shards = np.array_split(blobs, 3)

    def one_pass(centroids: np.ndarray) -> ClusterSums:
        first, *others = [partial_sums(shard, centroids) for shard in shards]
        for other in others:
            first = first.merge(other)
        return first

    messages: list[str] = []
    mapped = lloyd_passes(blobs[:30], one_pass=one_pass, max_epochs=4, tol=0, report=messages.append)
    streamed = train_lloyd(stream(blobs), n_clusters=30, init=blobs[:30], max_epochs=4, tol=0)
    np.testing.assert_allclose(mapped.centroids, streamed.centroids, atol=1e-6)
    assert len(messages) == 5


def test_minibatch_beats_scikit_learn_at_one_pass(blobs) -> None:
    from sklearn.cluster import MiniBatchKMeans

    result = train_minibatch(stream(blobs), n_clusters=100, batch_size=1024, max_epochs=1)
    check_result(result, blobs)
    peer = MiniBatchKMeans(100, n_init=1, random_state=0).fit(blobs)
    assert result.inertia <= peer.inertia_


@pytest.mark.parametrize("train", [train_lloyd, train_minibatch])
def test_identical_rows_and_one_row(train) -> None:
    same = train(stream(np.ones((50, 4), np.float32)), n_clusters=3)
    assert same.inertia == 0
    assert same.sizes.sum() == 50
    one = train(stream(np.full((1, 4), 2, np.float32)), n_clusters=1)
    assert one.centroids.tolist() == [[2, 2, 2, 2]]


@pytest.mark.parametrize("train", [train_lloyd, train_minibatch])
def test_training_refuses_what_it_cannot_cluster(train) -> None:
    with pytest.raises(ValueError, match="5 clusters need at least as many rows, and there are 4"):
        train(stream(np.eye(4, dtype=np.float32)), n_clusters=5)
    assert len(train(stream(np.eye(8, dtype=np.float32)), n_clusters=5, init_size=2).centroids) == 5  # not a reason
    with pytest.raises(ValueError, match="empty"):
        train(stream(np.empty((0, 4), np.float32)), n_clusters=2)
    rows = make_blobs(500, n_blobs=4)
    rows[123, 1] = np.nan
    with pytest.raises(ValueError, match=r"finite|NaN"):
        train(stream(rows), n_clusters=3)


# ---- cuML and the GPU ----------------------------------------------------------------------------------------------


def test_cuml_is_called_as_its_signature_says(monkeypatch, blobs) -> None:
    """A stand-in with the signature of cuML 26.10's KMeans: an argument that it does not have is a TypeError here."""
    asked: dict[str, object] = {}

    class KMeans:
        def __init__(self, n_clusters=8, *, max_iter=300, tol=1e-4, verbose=False, random_state=None,
                     init="scalable-k-means++", n_init="auto", oversampling_factor=2.0, max_samples_per_batch=32768,
                     device_buffer_samples=0, init_size=0, output_type=None):  # fmt: skip
            asked.update(n_clusters=n_clusters, max_iter=max_iter, random_state=random_state, init=init, n_init=n_init,
                         device_buffer_samples=device_buffer_samples, init_size=init_size)  # fmt: skip

        def fit(self, vectors):
            assert vectors.dtype == np.float32
            self.cluster_centers_, self.n_iter_ = vectors[:5], 7
            return self

    module = types.ModuleType("cuml.cluster")
    module.KMeans = KMeans  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuml", types.ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.cluster", module)
    result = train_cuml(blobs, n_clusters=5, max_iter=20, device_buffer_samples=4096, random_state=9)
    assert asked == {
        "n_clusters": 5,
        "max_iter": 20,
        "random_state": 9,
        "init": "k-means++",
        "n_init": 1,
        "device_buffer_samples": 4096,
        "init_size": 160,
    }
    assert (result.n_passes, result.converged) == (7, True)
    check_result(result, blobs)


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu(blobs) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_cpu, on_gpu = (partial_sums(blobs, blobs[:80], device=device) for device in ("cpu", "cuda"))
    assert np.array_equal(on_cpu.counts, on_gpu.counts)
    assert (assign(blobs, blobs[:80])[0] == assign(blobs, blobs[:80], device="cuda")[0]).mean() > 0.9999
    np.testing.assert_allclose(on_cpu.sums, on_gpu.sums, rtol=1e-9, atol=1e-9)
    result = train_lloyd(stream(blobs), n_clusters=100, device="cuda", precision="bf16")
    assert result.inertia <= 1.02 * train_lloyd(stream(blobs), n_clusters=100).inertia
