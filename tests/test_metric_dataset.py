"""Reading rows, numbering labels, splitting: what is refused, what is counted, and what never leaks."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config import UserError, settings_from_values
from metric_parts.corpus import load_corpus
from metric_parts.dataset import normalize_text, read_rows, share_text_keys
from metric_parts.labels import NO_CLASS, find_labels
from metric_parts.settings import DataSettings, TrainerSettings
from metric_parts.split import split_rows
from tests.tiny_encoder import training_rows, write_rows

DATA = DataSettings(parquet_path="unused")


def read(tmp_path, rows, **options):
    return read_rows(str(write_rows(tmp_path / "rows.parquet", rows)), settings=DATA, **options)


def simple(n=4, **columns):
    rows = {
        "text": [f"text {i}" for i in range(n)],
        "label": [f"l{i % 2}" for i in range(n)],
        "metric_mask": [1] * n,
        "classifier_mask": [1] * n,
    }
    return {name: values for name, values in {**rows, **columns}.items() if values is not None}


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_rows_come_with_their_masks_and_idle_rows_are_left_out(tmp_path):
    rows = read(tmp_path, simple(metric_mask=[1, 0, 0, 1], classifier_mask=[1, 1, 0, 0]))
    assert rows.texts == ["text 0", "text 1", "text 3"]
    assert rows.metric_mask.tolist() == [True, False, True]
    assert rows.classifier_mask.tolist() == [True, True, False]


def test_classification_mask_is_the_same_column_under_another_name(tmp_path):
    rows = read(tmp_path, simple(classifier_mask=None, classification_mask=[1, 1, 1, 0]))
    assert rows.classifier_mask.tolist() == [True, True, True, False]
    with pytest.raises(UserError, match="both classifier_mask and classification_mask"):
        read(tmp_path, simple(classification_mask=[1] * 4))


@pytest.mark.parametrize("masks", [[True, False, True, True], [1.0, 0.0, 1.0, 1.0], [1, 0, 1, 1]])
def test_masks_may_be_of_any_type_that_says_0_and_1(tmp_path, masks):
    rows = read(tmp_path, simple(metric_mask=masks))
    assert rows.metric_mask.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"metric_mask": None}, "no column 'metric_mask' \\(has: text, label, classifier_mask\\)"),
        ({"classifier_mask": None}, "no column 'classifier_mask'"),
        ({"metric_mask": [1, 2, 1, 0]}, "metric_mask must be 0 or 1 in every row, but holds 2 in row 1"),
        ({"classifier_mask": [1, None, 1, 0]}, "classifier_mask must be 0 or 1 in every row, but holds None in row 1"),
        ({"label": ["a", None, "b", None]}, r"column label is empty in 2 of them \(rows 1, 3\); give them labels"),
        ({"classifier_mask": ["1", "0", "1", "0"]}, "holds '1' in row 0; write numbers or booleans"),
        ({"metric_mask": [1, 0.5, 1, 0]}, r"holds 0\.5 in row 1"),
        ({"metric_mask": [0] * 4, "classifier_mask": [0] * 4}, "none of its 4 rows has a text and a mask of 1"),
        ({"text": [1, 2, 3, 4]}, "holds 1, which is no text"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_name(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, simple(**columns))


def test_a_row_is_named_by_its_place_in_its_own_file(tmp_path):
    """Files are read in pieces of 32,768 rows, and folders file by file."""
    n = 33_000
    write_rows(tmp_path / "rows" / "a.parquet", simple(5))
    for column, value in (("classifier_mask", 3), ("label", None)):
        rows = simple(n)
        rows[column][n - 2] = value
        write_rows(tmp_path / "rows" / "b.parquet", rows)
        with pytest.raises(UserError, match=rf"b\.parquet: .*rows? {n - 2}\b"):
            read_rows(str(tmp_path / "rows"), settings=DATA)


def test_a_file_with_bytes_that_are_no_text_is_damaged(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", simple(text=["text 0", "text 1", "zzzz", "text 3"]))
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(UserError, match=r"rows\.parquet is damaged .*restore the file if it is your input"):
        read_rows(str(path), settings=DATA)


@pytest.mark.parametrize("key", ["parquet_path", "valid_parquet_path", "test_parquet_path"])
def test_a_missing_file_names_the_key_that_asked_for_it(tmp_path, key):
    data = {"parquet_path": str(write_rows(tmp_path / "rows.parquet", simple())), key: "/nowhere/rows.parquet"}
    settings = settings_from_values(TrainerSettings, {"data": data}, source="test")
    with pytest.raises(UserError, match=rf"/nowhere/rows\.parquet does not exist; .*check data\.{key}$"):
        load_corpus(settings)


def test_a_label_may_be_null_where_no_mask_asks_for_it(tmp_path):
    rows = read(tmp_path, simple(label=["a", None, "b", "a"], metric_mask=[1, 0, 1, 1], classifier_mask=[1, 0, 1, 1]))
    assert rows.labels == ["a", "b", "a"]


def test_blank_texts_are_left_out(tmp_path):
    assert len(read(tmp_path, simple(text=["a", "", None, "  "]))) == 1


def test_a_folder_a_glob_and_a_file_hold_the_same_rows(tmp_path):
    table = pa.table(simple(6))
    for index in range(2):
        path = tmp_path / "folder" / f"part-{index:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.slice(3 * index, 3), path)
    whole = read(tmp_path, simple(6))
    for path in (tmp_path / "folder", tmp_path / "folder" / "part-*.parquet"):
        assert read_rows(str(path), settings=DATA).texts == whole.texts
    with pytest.raises(UserError, match="does not exist"):
        read_rows(str(tmp_path / "nothing*.parquet"), settings=DATA)


def test_rows_to_test_on_need_no_masks(tmp_path):
    rows = read(tmp_path, simple(metric_mask=None, classifier_mask=None), need_masks=False)
    assert rows.metric_mask.all() and rows.classifier_mask.all()


def test_texts_are_equal_up_to_case_spaces_and_punctuation():
    assert normalize_text("  Where IS my card?! ") == normalize_text("where is my card")
    assert normalize_text("где карта?") == normalize_text("Где карта")
    assert normalize_text("?!") != normalize_text("...")


# --- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        ([10, 9, 10, 9], ("9", "10")),  # numbers in their order, not in that of their text
        ([1.0, 2.0, 1.0, 2.0], ("1", "2")),  # what a null makes of ints in parquet
        (["1", "x", "10", "9"], ("1", "10", "9", "x")),
    ],
)
def test_labels_of_any_type_become_text_and_come_back(tmp_path, labels, classes):
    found = find_labels(read(tmp_path, simple(label=labels)))
    assert found.classes == classes
    assert [found.classes[code] for code in found.class_codes([*classes])] == list(classes)


def test_a_folder_of_int_and_str_labels_is_one_vocabulary(tmp_path):
    for index, labels in enumerate(([1, 2, 1, 2], ["1", "x", "2", "x"])):
        write_rows(tmp_path / "mixed" / f"part-{index}.parquet", simple(label=labels))
    found = find_labels(read_rows(str(tmp_path / "mixed"), settings=DATA))
    assert found.classes == ("1", "2", "x")


def test_the_head_knows_only_labels_with_a_classifier_row_and_supcon_all(tmp_path):
    found = find_labels(read(tmp_path, simple(label=["a", "b", "c", "c"], classifier_mask=[1, 1, 0, 0])))
    assert found.names == ("a", "b", "c") and found.classes == ("a", "b")
    assert found.class_codes(["c", "b"]).tolist() == [NO_CLASS, 1]
    assert found.codes(["c", "?"]).tolist() == [2, NO_CLASS]


@pytest.mark.parametrize("classifier", [[0, 0, 0, 0], [1, 0, 1, 0]])
def test_fewer_than_two_classes_are_refused(tmp_path, classifier):
    with pytest.raises(UserError, match="of the two classes that a classifier needs"):
        find_labels(read(tmp_path, simple(classifier_mask=classifier)))


# --- Split -----------------------------------------------------------------------------------------------------------


def test_the_split_is_stratified(tmp_path):
    rows = read(tmp_path, training_rows(n_classes=6, n_per_class=20))
    split = split_rows(rows, val_ratio=0.25, seed=1)
    held_out = [rows.labels[row] for row in split.valid]
    assert {label: held_out.count(label) for label in set(rows.labels)} == dict.fromkeys(set(rows.labels), 5)
    assert sorted([*split.train, *split.valid]) == list(range(len(rows)))


def test_equal_texts_stay_on_one_side_whatever_their_labels(tmp_path):
    texts = [f"text {i // 3}" + ("?" * (i % 3)) for i in range(90)]  # each text three times, in three spellings
    labels = [f"l{(i // 3) % 4}" if i % 3 else f"l{i % 5}" for i in range(90)]
    rows = read(tmp_path, simple(90, text=texts, label=labels))
    split = split_rows(rows, val_ratio=0.3, seed=0)
    assert len(split.valid) and not set(rows.text_keys[split.train]) & set(rows.text_keys[split.valid])


def test_classes_of_one_or_two_texts_stay_in_training(tmp_path, caplog):
    rows = read(tmp_path, simple(24, label=["a"] * 11 + ["b"] * 10 + ["lone", "pair", "pair"]))
    split = split_rows(rows, val_ratio=0.5, seed=0)
    assert {rows.labels[row] for row in split.valid} == {"a", "b"}
    assert "2 of 4 classes are too small" in caplog.text


def test_a_ratio_that_leaves_nothing_is_refused(tmp_path):
    rows = read(tmp_path, simple(8))
    with pytest.raises(UserError, match=r"val_ratio 0\.05 holds out no row"):
        split_rows(rows, val_ratio=0.05, seed=0)


def test_only_gold_labels_are_held_out(tmp_path):
    source = ["gold" if i % 4 == 0 else "cluster" for i in range(80)]
    rows = read(tmp_path, simple(80, label_source=source))
    split = split_rows(rows, val_ratio=0.5, seed=0)
    assert len(split.valid) == 10 and rows.is_gold[split.valid].all()


def test_texts_of_two_files_are_compared(tmp_path):
    first = read(tmp_path, simple(3, text=["One.", "two", "three"], label=["a"] * 3))
    second = read(tmp_path, simple(2, text=["four", "one"], label=["a"] * 2))
    one, two = share_text_keys([first, second])
    assert np.isin(two.text_keys, one.text_keys).tolist() == [False, True]
