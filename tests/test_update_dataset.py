"""Stage 6 through its main: every threshold, gold labels, balance, holdout and the forms of output."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.columns import vector_array
from tests.stage_runner import read_folder, run_stage, write_parquet

SCRIPT = "cluster_update_dataset"

# Four clusters: 0 is pure "a" by many labels, 1 is 0.7 "b", 2 is pure "b" by two labels only, 3 has no labels.
CENTROIDS = {
    "centroid_id": [0, 1, 2, 3],
    "center": vector_array(np.eye(4, dtype=np.float32)),
    "purity": [1.0, 0.7, 1.0, None],
    "majority_label": ["a", "b", "b", None],
    "n_labeled": [50, 10, 2, 0],
    "purity_lower_bound": [0.95, 0.45, 0.43, 0.0],
}

# text, label, cluster, top probability (None: no probs), prediction
ROWS = [
    ("gold in its cluster", "a", 0, 0.9, "a"),
    ("gold against its cluster", "b", 0, 0.9, "a"),
    ("sure and pure", None, 0, 0.95, "a"),
    ("unsure and pure", None, 0, 0.4, "a"),
    ("they disagree", None, 0, 0.95, "b"),
    ("mixed cluster", None, 1, 0.9, "b"),
    ("few labels", None, 2, 0.9, "b"),
    ("no labels", None, 3, 0.9, "b"),
    ("no cluster", None, None, 0.9, "a"),
    ("no probs", None, 0, None, None),
    (None, None, 0, 0.9, "a"),
    (" ", "a", 0, 0.9, "a"),
]


def columns_of(rows, *, label_type=None) -> dict:
    texts, labels, clusters, top, predicted = (list(column) for column in zip(*rows, strict=True))
    probs = [None if p is None else [p, (1 - p) / 2, (1 - p) / 2] for p in top]
    return {
        "row": list(range(len(rows))),
        "text": pa.array(texts, pa.string()),
        "label": pa.array(labels, label_type or pa.string()),
        "cluster_id": pa.array(clusters, pa.int32()),
        "probs": pa.array(probs, pa.list_(pa.float32(), 3)),
        "prediction": pa.array(predicted, pa.string()),
        "cls": pa.array([[0.0, 1.0]] * len(rows), pa.list_(pa.float32(), 2)),
        "teacher_label": ["t"] * len(rows),
    }


@pytest.fixture
def update(tmp_path):
    """Run stage 6 on rows in `n_shards` plain shards; the dataset is `tmp_path / output`."""

    def call(*arguments, rows=ROWS, columns=None, centroids=CENTROIDS, n_shards=2, output="dataset", **values):
        table = pa.table(columns or columns_of(rows))
        edges = [table.num_rows * i // n_shards for i in range(n_shards + 1)]
        for index in range(n_shards):
            part = table.slice(edges[index], edges[index + 1] - edges[index])
            (tmp_path / "in").mkdir(exist_ok=True)
            pq.write_table(part, tmp_path / "in" / f"{index}.parquet")
        write_parquet(tmp_path / "centroids.parquet", centroids)
        own = {
            "shards_dir": str(tmp_path / "in"),
            "centroids_path": str(tmp_path / "centroids.parquet"),
            "output_path": str(tmp_path / output),
        }
        return run_stage(SCRIPT, tmp_path, own | values, *arguments)

    return call


def dataset(tmp_path, output: str = "dataset") -> pa.Table:
    path = tmp_path / output
    return pq.read_table(path) if path.is_file() else read_folder(path)


def masks(tmp_path) -> dict[str, tuple]:
    """Label, source and both masks by text."""
    table = dataset(tmp_path)
    names = ("label", "label_source", "metric_mask", "classifier_mask")
    return {
        text: tuple(values)
        for text, *values in zip(table["text"].to_pylist(), *(table[name].to_pylist() for name in names), strict=True)
    }


NOT_USED = (None, None, 0, 0)


# --- Decisions -------------------------------------------------------------------------------------------------------


def test_defaults_row_by_row(tmp_path, update):
    result = update()
    assert masks(tmp_path) == {
        "gold in its cluster": ("a", "gold", 1, 1),
        "gold against its cluster": ("b", "gold", 1, 1),
        "sure and pure": ("a", "cluster", 1, 1),
        "unsure and pure": ("a", "cluster", 1, 1),
        "they disagree": ("a", "cluster", 1, 1),
        "mixed cluster": NOT_USED,
        "few labels": ("b", "cluster", 1, 1),
        "no labels": NOT_USED,
        "no cluster": NOT_USED,
        "no probs": ("a", "cluster", 1, 1),
        None: NOT_USED,
        " ": ("a", "gold", 0, 0),
    }
    assert {name: result.json[name] for name in ("rows", "gold", "cluster", "classifier", "dropped")} == {
        "rows": 12, "gold": 3, "cluster": 5, "classifier": 0, "dropped": 0,
    }  # fmt: skip
    assert (result.json["metric_mask"], result.json["classifier_mask"]) == (7, 7)


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"metric_purity_threshold": 0.7}, {"mixed cluster": ("b", "cluster", 1, 0)}),
        ({"classification_purity_threshold": 0.7}, {"mixed cluster": ("b", "cluster", 0, 1)}),
        (
            {"metric_max_prob_threshold": 0.5},
            {"unsure and pure": ("a", "cluster", 0, 1), "no probs": ("a", "cluster", 0, 1)},
        ),
        (
            {"classification_max_prob_threshold": 0.92},
            {
                "unsure and pure": ("a", "cluster", 1, 0),
                "no probs": ("a", "cluster", 1, 0),
                "few labels": ("b", "cluster", 1, 0),
            },
        ),
        ({"min_labeled_per_cluster": 3}, {"few labels": NOT_USED}),
        ({"use_purity_lower_bound": True}, {"few labels": NOT_USED}),
        ({"require_agreement": True}, {"they disagree": NOT_USED, "no probs": NOT_USED}),
        (
            {"pseudo_label_from": "classifier"},
            {
                "sure and pure": ("a", "classifier", 1, 1),
                "unsure and pure": ("a", "classifier", 1, 1),
                "they disagree": ("b", "classifier", 1, 1),
                "mixed cluster": ("b", "classifier", 1, 1),
                "few labels": ("b", "classifier", 1, 1),
                "no labels": ("b", "classifier", 1, 1),
                "no cluster": ("a", "classifier", 1, 1),
                "no probs": NOT_USED,
            },
        ),
    ],
)
def test_each_key_changes_just_these_rows(tmp_path, update, values, changed):
    update(output="before")
    before = dict(
        zip(dataset(tmp_path, "before")["text"].to_pylist(), dataset(tmp_path, "before").to_pylist(), strict=True)
    )
    update(**values)
    found = masks(tmp_path)
    names = ("label", "label_source", "metric_mask", "classifier_mask")
    moved = {text: row for text, row in found.items() if row != tuple(before[text][name] for name in names)}
    assert moved == changed


def test_gold_is_never_overwritten(tmp_path, update):
    rng = np.random.default_rng(0)
    rows = [
        (
            f"t{i}",
            rng.choice(["a", "b", "c", None]),
            int(rng.integers(0, 4)),
            float(rng.random()),
            rng.choice(["a", "b"]),
        )
        for i in range(300)
    ]
    for source in ("cluster", "classifier"):
        for extra in ({}, {"downsample": True}, {"max_per_class": 5}):
            update("--overwrite", rows=rows, pseudo_label_from=source, **extra)
            table = dataset(tmp_path)
            for (_, gold, *_), label, label_source in zip(
                rows, table["label"].to_pylist(), table["label_source"].to_pylist(), strict=True
            ):
                assert gold is None or (label, label_source) == (gold, "gold")
                assert gold is not None or label_source != "gold"


def test_reason_of_every_row(tmp_path, update):
    update(metric_max_prob_threshold=0.5, classification_max_prob_threshold=0.5, min_labeled_per_cluster=3)
    table = dataset(tmp_path)
    assert dict(zip(table["text"].to_pylist(), table["label_reason"].to_pylist(), strict=True)) == {
        "gold in its cluster": "gold label",
        "gold against its cluster": "gold label",
        "sure and pure": "pure cluster and sure classifier",
        "unsure and pure": "classifier is not sure enough",
        "they disagree": "pure cluster and sure classifier",
        "mixed cluster": "cluster is not pure enough",
        "few labels": "cluster has too few labels",
        "no labels": "cluster has too few labels",
        "no cluster": "no cluster",
        "no probs": "classifier is not sure enough",
        None: "no text",
        " ": "no text",
    }


# --- Balance ---------------------------------------------------------------------------------------------------------


def balanced_rows() -> list[tuple]:
    """Six rows of a, the later the surer; three of b, of which one is gold."""
    rows = [(f"a{i}", None, 0, 0.5 + i / 20, "a") for i in range(6)]
    return [*rows, ("b0", "b", 2, 0.1, "b"), ("b1", None, 2, 0.6, "b"), ("b2", None, 2, 0.7, "b")]


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("output", ["dataset", "dataset.parquet"])
@pytest.mark.parametrize(
    ("values", "used"),
    [
        ({"downsample": True}, {"a3", "a4", "a5", "b0", "b1", "b2"}),
        ({"max_per_class": 2}, {"a4", "a5", "b0", "b2"}),  # gold before every pseudo-label
        ({"max_per_class": 1}, {"a5", "b0"}),
        ({"downsample": True, "max_per_class": 2}, {"a4", "a5", "b0", "b2"}),
    ],
)
def test_balanced_classes_keep_the_surest_rows(tmp_path, update, n_shards, output, values, used):
    result = update(rows=balanced_rows(), n_shards=n_shards, output=output, **values)
    table = dataset(tmp_path, output)
    assert table.num_rows == 9 and result.json["dropped"] == 0
    taken = {
        text for text, mask in zip(table["text"].to_pylist(), table["metric_mask"].to_pylist(), strict=True) if mask
    }
    assert taken == used
    left = dict(zip(table["text"].to_pylist(), table["label_reason"].to_pylist(), strict=True))
    assert left["a0"] == "left out to balance the classes"


def shared_rows() -> list[tuple]:
    """Five predictions of a and three of b, in no order; two of a are equally sure, and every b is less sure."""
    sureness = {"a": (0.8, 0.95, 0.9, 0.9, 0.7), "b": (0.5, 0.65, 0.6)}
    rows = [(f"{label}{p:.2f}", None, 0, p, label) for label, probs in sureness.items() for p in probs]
    return [*rows, ("gold", "b", 0, 0.4, "b"), ("no probs", None, 0, None, None)]


@pytest.mark.parametrize(("share", "taken"), [(0.07, 7), (0.14, 14), (0.145, 15), (1e-12, 1)])
def test_a_share_is_rounded_up_but_not_by_the_error_of_its_product(tmp_path, update, share, taken):
    rows = [(f"t{i}", None, 0, 0.4 + i / 200, "a") for i in range(100)]
    result = update(rows=rows, pseudo_label_from="classifier", metric_class_share=share)
    assert result.json["metric_mask"] == taken


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("output", ["dataset", "dataset.parquet"])
def test_the_surest_share_of_each_class(tmp_path, update, n_shards, output):
    """Of five rows of a two fifths are two, and a tie takes the third; of three rows of b two fifths are rounded up."""
    update(
        rows=shared_rows(), n_shards=n_shards, output=output, pseudo_label_from="classifier",
        metric_class_share=0.8, classification_class_share=0.4, keep_unused=False,
    )  # fmt: skip
    table = dataset(tmp_path, output)
    both, metric_alone = (
        {text for text, *got in zip(*(table[name].to_pylist() for name in ("text", "metric_mask", "classifier_mask")),
                                    strict=True) if got == wanted}
        for wanted in ([1, 1], [1, 0])
    )  # fmt: skip
    assert both == {"a0.95", "a0.90", "b0.65", "b0.60", "gold"}
    assert metric_alone == {"a0.80", "b0.50"}
    assert sum(table["classifier_mask"].to_pylist()) == 6


def test_rows_beyond_the_share_say_why_and_a_share_of_zero_takes_none(tmp_path, update):
    update(rows=shared_rows(), pseudo_label_from="classifier", metric_class_share=0, classification_class_share=0.5)
    table = dataset(tmp_path)
    assert sum(table["metric_mask"].to_pylist()) == 1  # the gold one
    left = dict(zip(table["text"].to_pylist(), table["label_reason"].to_pylist(), strict=True))
    assert left["a0.70"] == left["b0.50"] == "not among the surest of its class"
    assert left["no probs"] == "no prediction" and left["a0.95"] == "sure classifier"


def test_agreement_widens_the_metric_share_alone(tmp_path, update):
    """All are in a cluster of a: beyond the surest fifth the rows of a are confirmed, those of b are not."""
    update(
        rows=shared_rows(), pseudo_label_from="classifier", metric_class_share=0.2, classification_class_share=0.2,
        agreement_gets_metric_mask=True,
    )  # fmt: skip
    names = ("text", "metric_mask", "classifier_mask", "label_reason")
    got = set(zip(*(dataset(tmp_path)[name].to_pylist() for name in names), strict=True))
    assert {row for row in got if row[0].startswith("a")} == {
        ("a0.95", 1, 1, "sure classifier"),
        *((f"a{sureness}", 1, 0, "cluster and classifier agree") for sureness in ("0.90", "0.80", "0.70")),
    }
    assert {row for row in got if row[0].startswith("b")} == {
        ("b0.65", 1, 1, "sure classifier"),
        *((f"b{sureness}", 0, 0, "not among the surest of its class") for sureness in ("0.60", "0.50")),
    }


def test_agreement_without_a_share_is_refused(update):
    outcome = update(agreement_gets_metric_mask=True)
    assert outcome.exit_code == 2 and "adds to metric_class_share, which is 1" in outcome.error


def test_share_of_each_class_without_any_label(tmp_path, update):
    rows = [(f"t{i}", None, 3, 0.9, None) for i in range(4)]
    centroids = CENTROIDS | {"majority_label": pa.array([None] * 4, pa.string()), "n_labeled": [0] * 4}
    result = update(rows=rows, centroids=centroids, metric_class_share=0.5)
    assert result.json["rows"] == 4 and sum(dataset(tmp_path)["metric_mask"].to_pylist()) == 0


@pytest.mark.parametrize("output", ["dataset", "dataset.parquet"])
def test_unused_rows_may_be_dropped_and_are_counted(tmp_path, update, output):
    result = update(keep_unused=False, output=output)
    table = dataset(tmp_path, output)
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4, 6, 9]
    assert result.json["rows"] == 7 and result.json["dropped"] == 5
    assert "rows in 12, rows out 7, dropped 5" in result.stderr


def test_balance_and_dropping_together(tmp_path, update):
    update(rows=balanced_rows(), max_per_class=1, keep_unused=False)
    assert dataset(tmp_path)["text"].to_pylist() == ["a5", "b0"]


# --- Columns ---------------------------------------------------------------------------------------------------------


def test_columns_of_the_dataset(tmp_path, update):
    update()
    table = dataset(tmp_path)
    assert table.schema.names == [
        "text", "label", "metric_mask", "classifier_mask", "label_source", "label_reason", "label_confidence",
        "row", "cluster_id", "prediction", "teacher_label",
    ]  # fmt: skip
    assert table["row"].to_pylist() == list(range(12))
    assert table.schema.field("metric_mask").type == pa.int8()


def test_whole_number_labels_stay_whole_numbers(tmp_path, update):
    centroids = CENTROIDS | {"majority_label": ["7", "12", "12", None]}
    rows = [("x", 7, 0, 0.9, "7"), ("y", None, 2, 0.9, "12"), ("z", None, None, 0.9, None)]
    update(columns=columns_of(rows, label_type=pa.int16()), centroids=centroids)
    table = dataset(tmp_path)
    assert table.schema.field("label").type == pa.int16()
    assert table["label"].to_pylist() == [7, 12, None]


def test_whole_numbers_beside_other_labels_become_text(tmp_path, update):
    rows = [("x", 7, 0, 0.9, "7"), ("y", None, 2, 0.9, "12")]
    update(columns=columns_of(rows, label_type=pa.int64()))  # the clusters say "a" and "b"
    assert dataset(tmp_path)["label"].to_pylist() == ["7", "b"]


def test_labels_that_do_not_fit_the_column_of_gold(tmp_path, update):
    centroids = CENTROIDS | {"majority_label": ["7", "300", "300", None]}
    rows = [("x", 7, 0, 0.9, "7"), ("y", None, 2, 0.9, "300")]
    result = update(columns=columns_of(rows, label_type=pa.int8()), centroids=centroids)
    assert result.exit_code == 0, result.stderr
    assert dataset(tmp_path)["label"].to_pylist() == [7, 300]


def test_lists_of_numbers_that_are_no_vectors_of_ours_are_carried(tmp_path, update):
    columns = columns_of(ROWS) | {"token_ids": [[1, 2, 3]] * 12, "place": [[59.9, 30.3]] * 12}
    update(columns=columns)
    table = dataset(tmp_path)
    assert table["token_ids"].to_pylist() == [[1, 2, 3]] * 12
    assert "place" in table.schema.names and "cls" not in table.schema.names


def test_without_labels_probs_and_predictions(tmp_path, update):
    columns = {name: column for name, column in columns_of(ROWS).items() if name in ("text", "cluster_id", "row")}
    update(columns=columns)
    found = masks(tmp_path)
    assert found["sure and pure"] == ("a", "cluster", 1, 1)
    assert found["mixed cluster"] == NOT_USED
    result = update(
        "--overwrite", columns=columns, metric_max_prob_threshold=0.1, classification_max_prob_threshold=0.1
    )
    assert result.json["cluster"] == 0


def test_probs_that_are_all_null(tmp_path, update):
    columns = columns_of(ROWS) | {
        "probs": pa.nulls(12, pa.list_(pa.float32())),
        "prediction": pa.nulls(12, pa.string()),
    }
    update(columns=columns)
    assert masks(tmp_path)["sure and pure"] == ("a", "cluster", 1, 1)


def test_own_names_of_columns(tmp_path, update):
    columns = columns_of(ROWS)
    renamed = {"utterance": columns["text"], "intent": columns["label"], "topic": columns["cluster_id"]}
    update(columns=renamed, text_column="utterance", label_column="intent", cluster_id_column="topic")
    assert dataset(tmp_path).schema.names[:2] == ["text", "label"]
    assert masks(tmp_path)["gold against its cluster"] == ("b", "gold", 1, 1)


# --- Output ----------------------------------------------------------------------------------------------------------


def test_file_and_folder_hold_the_same_rows(tmp_path, update):
    update(n_shards=3)
    update(n_shards=3, output="dataset.parquet")
    assert dataset(tmp_path).equals(dataset(tmp_path, "dataset.parquet"))
    assert len(list((tmp_path / "dataset").glob("part-*.parquet"))) == 3
    facts = json.loads((tmp_path / "dataset.json").read_text())
    assert facts["totals"]["rows"] == 12 and facts["config"]["output_path"].endswith("dataset.parquet")


@pytest.mark.parametrize("output", ["dataset", "dataset.parquet"])
def test_again_and_with_another_threshold(tmp_path, update, output):
    first = update(output=output)
    again = update(output=output)
    assert again.json == first.json and "nothing to do" in again.stderr
    other = update(output=output, metric_purity_threshold=0.5)
    assert other.exit_code == 1
    assert "metric_purity_threshold: 0.8 -> 0.5" in other.error and "--overwrite" in other.error
    assert update("--overwrite", output=output, metric_purity_threshold=0.5).exit_code == 0


def test_file_of_somebody_else_is_not_replaced(tmp_path, update):
    write_parquet(tmp_path / "dataset.parquet", {"mine": [1]})
    result = update(output="dataset.parquet")
    assert result.exit_code == 1 and "no stage of this suite wrote it" in result.error
    assert pq.read_table(tmp_path / "dataset.parquet").to_pydict() == {"mine": [1]}


def test_centroids_without_purity_name_the_stage(update):
    centroids = {name: CENTROIDS[name] for name in ("centroid_id", "center")}
    result = update(centroids=centroids)
    assert result.exit_code == 1
    assert "has no column 'purity'; run cluster_purity_counter.py first" in result.error


def test_check_writes_nothing(tmp_path, update):
    plan = update("--check").json
    assert plan["rows"] == 12 and plan["rules"]["metric_purity"] == 0.8
    assert not (tmp_path / "dataset").exists()


# --- Holdout ---------------------------------------------------------------------------------------------------------


def test_holdout_tells_accuracy_and_coverage(update):
    """Half of the labels of a clean clustering hidden: the rules bring nearly all of them back."""
    rows = [(f"t{i}", "ab"[i % 2], i % 2, 0.9, "ab"[i % 2]) for i in range(200)]
    centroids = CENTROIDS | {"n_labeled": [100, 100, 0, 0], "purity": [1.0, 1.0, None, None]}
    log = update(rows=rows, centroids=centroids, holdout_fraction=0.5).stderr
    hidden = int(re.search(r"holdout: (\d+) gold labels hidden", log)[1])
    assert 70 <= hidden <= 130
    assert f"metric_mask: accuracy 100.0%, coverage 100.0% ({hidden} rows)" in log


def test_hidden_labels_do_not_vote_for_themselves(update):
    """Each cluster holds one labelled row: with its own vote it would be right, without it nobody can say."""
    n_clusters = 60
    rows = [(f"t{i}", f"l{i}", i, 0.9, None) for i in range(n_clusters)]
    centroids = {
        "centroid_id": list(range(n_clusters)),
        "center": vector_array(np.eye(n_clusters, dtype=np.float32)),
        "purity": [1.0] * n_clusters,
        "majority_label": [f"l{i}" for i in range(n_clusters)],
        "n_labeled": [1] * n_clusters,
        "purity_lower_bound": [0.27] * n_clusters,
    }
    log = update(rows=rows, centroids=centroids, holdout_fraction=0.5).stderr
    assert "metric_mask: accuracy –, coverage 0.0% (no row labelled)" in log


def test_holdout_tells_each_mask_apart_where_agreement_widens_one(update):
    """Equally sure rows but one: the head takes that one alone, the metric loss all that their cluster confirms."""
    rows = [(f"t{i}", "a", 0, 0.9 if i else 0.95, "a") for i in range(200)]
    rows += [(f"u{i}", None, 0, 0.9 if i else 0.95, "a") for i in range(100)]
    centroids = CENTROIDS | {"n_labeled": [200, 0, 0, 0]}
    log = update(
        rows=rows, centroids=centroids, holdout_fraction=0.5, pseudo_label_from="classifier",
        metric_class_share=0.01, classification_class_share=0.01, agreement_gets_metric_mask=True,
    ).stderr  # fmt: skip
    hidden = int(re.search(r"holdout: (\d+) gold labels hidden", log)[1])
    assert f"metric_mask: accuracy 100.0%, coverage 100.0% ({hidden} rows)" in log
    in_head = re.search(r"classifier_mask: accuracy .*\((.*) rows?", log)[1]
    assert in_head in {"1", "no"}


def test_holdout_leaves_the_dataset_as_it_is(tmp_path, update):
    update(output="before")
    update(holdout_fraction=0.5)
    assert dataset(tmp_path, "before").equals(dataset(tmp_path))


def test_holdout_without_gold_labels(update):
    rows = [(f"t{i}", None, 0, 0.9, "a") for i in range(10)]
    assert "holdout: no gold labels to hide" in update(rows=rows, holdout_fraction=0.5).stderr


@pytest.mark.parametrize("purity", [["x"] * 4, [[1.0]] * 4], ids=["text", "lists"])
def test_purity_that_is_no_number_is_an_error_that_names_file_and_column(tmp_path, update, purity):
    outcome = update(centroids=CENTROIDS | {"purity": purity})
    assert f"{tmp_path / 'centroids.parquet'}, column 'purity' holds" in outcome.error


def test_purity_of_which_nothing_is_known_labels_nothing(update):
    """Written by a program that had no labels: a column of nulls."""
    result = update(centroids=CENTROIDS | {"purity": pa.nulls(4)})
    assert result.json["cluster"] == 0
