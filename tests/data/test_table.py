import os

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from peft import LoraConfig, get_peft_model
from torch.nn.functional import normalize

from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.images import guess_columns, load_images
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.tuners import CoOpConfig


@pytest.fixture
def table(encoder, make_dataset, tmp_path) -> FeatureTable:
    return embed_dataset(encoder, make_dataset(11), cache_dir=tmp_path / "cache")


@pytest.fixture
def watched(encoder):
    """``watched()``: number of pictures that the encoder has looked at."""
    seen = []
    encoder.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return lambda: sum(seen)


def same(left: FeatureTable, right: FeatureTable) -> None:
    torch.testing.assert_close(left.embeds, right.embeds, atol=1e-6, rtol=0)
    assert torch.equal(left.labels, right.labels) and list(left.class_names) == list(right.class_names)


# A table in place of pictures


def test_a_table_of_the_model_is_taken_as_it_is(encoder, table):
    same(embed_dataset(encoder, table), table)
    same(embed_dataset(encoder, FeatureTable(table.embeds, table.labels, table.class_names, model=encoder)), table)


def test_a_table_says_whose_rows_it_has(encoder, table, model_dir):
    with pytest.raises(ValueError, match="of no model that is named.*FeatureTable\\(rows, model=encoder\\)"):
        embed_dataset(encoder, FeatureTable(table.embeds))
    other = DualEncoder.from_pretrained(model_dir("clip", seed=1))
    with pytest.raises(ValueError, match="these embeddings are of .*, and those of DualEncoder"):
        embed_dataset(other, table)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda x: x[:, :-1], r"are \(N, {d}\), these are \(N, {less}\)"),
        (lambda x: x * torch.tensor([1.0] * 5 + [2.0] + [1.0] * 5)[:, None], "row 5 has length 2, and"),
        (lambda x: x.index_fill(0, torch.tensor(7), torch.nan), "row 7 has length nan"),
    ],
)
def test_rows_of_a_table_are_checked(encoder, table, spoil, said):
    with pytest.raises(ValueError, match=said.format(d=encoder.embed_dim, less=encoder.embed_dim - 1)):
        embed_dataset(encoder, FeatureTable(spoil(table.embeds), model=encoder))


def test_a_table_takes_rows_as_they_come(encoder, table):
    rows = table.embeds
    for given in (rows.numpy(), rows.tolist(), rows.clone().requires_grad_()):
        same(embed_dataset(encoder, FeatureTable(given, table.labels, table.class_names, model=encoder)), table)
    assert FeatureTable(rows.clone().requires_grad_(), model=encoder).to_dataset().num_rows == 11
    with pytest.raises(ValueError, match="and there are none"):
        embed_dataset(encoder, FeatureTable(rows[:0], model=encoder))
    with pytest.raises(ValueError, match="labels must be indices of the class names, not such as 'cat'"):
        FeatureTable(rows, ["cat"] * 11)
    for fractions in ([0.0, 1.7] * 5 + [1.0], torch.full((11,), 1.7)):
        with pytest.raises(ValueError, match="labels must be indices of the class names"):
            FeatureTable(rows, fractions)
    with pytest.raises(TypeError, match="model must be a DualEncoder, not of the type str"):
        FeatureTable(rows, model="openai/clip-vit-base-patch32")


def test_a_table_of_the_tower_serves_whoever_wants_the_embeddings(encoder, make_dataset, table, tmp_path):
    wide = embed_dataset(encoder, make_dataset(11), tower=True, cache_dir=tmp_path / "cache")
    assert wide.embeds.shape[1] == encoder.embed_dim + encoder.tower_dim
    same(embed_dataset(encoder, wide), table)
    assert embed_dataset(encoder, wide, tower=True).embeds.shape == wide.embeds.shape


# There and back


@pytest.mark.parametrize("tower", [False, True])
def test_there_and_back_by_parquet(encoder, make_dataset, watched, tower, tmp_path):
    table = embed_dataset(encoder, make_dataset(11), tower=tower, cache_dir=tmp_path / "cache")
    table.to_dataset().to_parquet(tmp_path / "rows.parquet")
    again = load_images(str(tmp_path / "rows.parquet"))
    assert again.column_names == [encoder.name_or_path, "label"]
    before = watched()
    read = embed_dataset(encoder, again, tower=tower)
    assert watched() == before  # no picture was looked at
    same(read, table)
    assert read.embeds.shape == table.embeds.shape and read.model == ModelId.of(encoder)
    assert torch.equal(torch.cat(list(read.batches(4))), read.embeds)
    same(read.select([3, 3, 0]), table.select([3, 3, 0]))
    assert len(list(read.share())) == 1
    small = embed_dataset(encoder, again.select([5, 2]), tower=tower)  # picked rows, in that order
    same(small, table.select([5, 2]))


def test_rows_without_labels(encoder, table):
    plain = FeatureTable(table.embeds.half(), model=encoder).to_dataset()
    assert plain.column_names == [encoder.name_or_path]
    read = embed_dataset(encoder, plain)
    assert read.labels is None
    torch.testing.assert_close(read.embeds, table.embeds, atol=1e-3, rtol=0)
    torch.testing.assert_close(read.embeds.norm(dim=1), torch.ones(11), atol=1e-6, rtol=0)


def test_a_nameless_model_has_no_column(table):
    with pytest.raises(ValueError, match="the column is called as the model is"):
        FeatureTable(table.embeds).to_dataset()


def test_a_dataset_of_a_table_knows_whose_images_it_is_of(encoder, table, model_dir):
    first, again = table.to_dataset(), table.to_dataset()
    assert first._fingerprint == again._fingerprint
    assert FeatureTable(table.embeds.flip(0), model=encoder).to_dataset()._fingerprint != first._fingerprint


# Columns


def column(rows, kind: str = "list", dtype: pa.DataType | None = None) -> Dataset:
    dtype = dtype or pa.float32()
    rows = [None if row is None else list(map(float, row)) for row in rows]
    width = len(rows[0])
    kind = pa.list_(dtype, width) if kind == "fixed" else pa.large_list(dtype) if kind == "large" else pa.list_(dtype)
    return Dataset(pa.table({"b32": pa.array(rows, kind)}))


@pytest.mark.parametrize("dtype", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_a_column_under_any_name(encoder, table, kind, dtype):
    rows = table.embeds.numpy().astype(dtype.to_pandas_dtype())
    data, name = column(rows, kind, dtype), {encoder.name_or_path: "b32"}
    read = embed_dataset(encoder, data, embedding_columns=name)
    torch.testing.assert_close(read.embeds, table.embeds, atol=1e-3 if dtype == pa.float16() else 1e-6, rtol=0)
    with pytest.raises(ValueError, match="neither pictures nor embeddings of DualEncoder.*embedding_columns={"):
        embed_dataset(encoder, data)
    with pytest.raises(ValueError, match="no column 'b16'; the columns are b32"):
        embed_dataset(encoder, data, embedding_columns={encoder.name_or_path: "b16"})


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda rows: rows[:, :-1], "column 'b32' has {less} numbers a row, and the model's embeddings have {d}"),
        (lambda rows: [*rows[:4], rows[4][:-1], *rows[5:]], "column 'b32': row 4 has not {d} numbers"),
        (lambda rows: [*rows[:4], None, *rows[5:]], "column 'b32': row 4 has not {d} numbers"),
        (lambda rows: rows * 10, "column 'b32': row 0 has length 10, and embeddings are unit rows: divide"),
        (lambda rows: [*rows[:9], np.zeros(len(rows[0])), rows[10]], "column 'b32': row 9 has length 0"),
        (lambda rows: [*rows[:9], rows[9] * np.nan, rows[10]], "column 'b32': row 9 has length nan"),
    ],
)
def test_rows_of_a_column_are_checked(encoder, table, spoil, said):
    data = column(spoil(table.embeds.numpy()))
    with pytest.raises(ValueError, match=said.format(d=encoder.embed_dim, less=encoder.embed_dim - 1)):
        list(embed_dataset(encoder, data, embedding_columns={encoder.name_or_path: "b32"}).batches(3))


def test_a_column_of_other_things(encoder):
    data = Dataset.from_dict({"b32": ["a", "b"], "rows": [[1.0], [1.0]]})
    with pytest.raises(ValueError, match="column 'b32' must hold lists of floating-point numbers"):
        embed_dataset(encoder, data, embedding_columns={encoder.name_or_path: "b32"})
    with pytest.raises(ValueError, match="no image column found among b32"):
        embed_dataset(encoder, data.select_columns("b32"))
    with pytest.raises(ValueError, match="embeddings will not do here"):  # what trains on pictures
        guess_columns(data)


def test_pictures_beside_the_rows_tell_whether_they_are_right(encoder, make_dataset, table, watched, tmp_path):
    pictures = make_dataset(11)
    rows = table.to_dataset().remove_columns("label")
    both = concatenate_datasets([pictures, rows], axis=1)
    before = watched()
    same(embed_dataset(encoder, both, cache_dir=tmp_path / "none"), table)
    assert watched() - before == 2 and not (tmp_path / "none").exists()
    wrong = concatenate_datasets([pictures, rows.select(range(10, -1, -1)).flatten_indices()], axis=1)
    with pytest.raises(ValueError, match="is not what .* makes of the pictures beside it .*row 0"):
        embed_dataset(encoder, wrong)
    # A mapping that does not name the model: its pictures are looked at.
    same(embed_dataset(encoder, wrong, embedding_columns={}, cache_dir=tmp_path / "made"), table)


def test_pictures_that_are_elsewhere(encoder, table):
    features = Features({"image": datasets.Image(), encoder.name_or_path: List(Value("float32"))})
    away = [{"path": f"{i}.jpg", "bytes": None} for i in range(11)]
    data = Dataset.from_dict({"image": away, encoder.name_or_path: table.embeds.numpy()}, features=features)
    torch.testing.assert_close(embed_dataset(encoder, data).embeds, table.embeds, atol=1e-6, rtol=0)


def test_rows_are_read_when_asked_for(encoder):
    rows = normalize(torch.randn(5000, encoder.embed_dim, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[4500] *= 3
    data = FeatureTable(rows, model=encoder).to_dataset()
    table = embed_dataset(encoder, data)
    blocks = table.batches(1000)
    for start in range(0, 4000, 1000):
        torch.testing.assert_close(next(blocks), rows[start : start + 1000], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="row 4500 has length 3"):
        next(blocks)


# Adapters in the model


def test_a_tuned_image_tower_has_other_rows(encoder, table):
    targets = r"vision_model\..*q_proj"
    tuned = DualEncoder(get_peft_model(encoder.model, LoraConfig(r=2, target_modules=targets)))
    with pytest.raises(ValueError, match="and those of DualEncoder.*LORA adapter.* are asked for"):
        embed_dataset(tuned, table)
    with pytest.raises(ValueError, match="neither pictures nor embeddings of DualEncoder.*LORA"):
        embed_dataset(tuned, table.to_dataset())


def test_tuned_words_leave_pictures_as_they_are(encoder, table):
    tuned = DualEncoder(get_peft_model(encoder.model, CoOpConfig(n_ctx=2)), encoder.processor, encoder.name_or_path)
    same(embed_dataset(tuned, table), table)
    same(embed_dataset(tuned, table.to_dataset()), table)


def test_a_model_is_known_by_any_spelling_of_its_folder(encoder, table, watched, model_dir):
    folder, rows = encoder.name_or_path, table.to_dataset().rename_column(encoder.name_or_path, "b32")
    before = watched()
    for spelt in (folder + "/", os.path.relpath(folder), folder + "@main"):
        same(embed_dataset(encoder, rows, embedding_columns={spelt: "b32"}), table)
        same(embed_dataset(encoder, rows.rename_column("b32", spelt)), table)
    assert watched() == before
    with pytest.raises(ValueError, match="columns 'b32' and 'label' are both of .*: name one"):
        embed_dataset(encoder, rows, embedding_columns={folder: "b32", folder + "@v2": "label"})
    with pytest.raises(TypeError, match="embedding_columns must be a Mapping"):
        embed_dataset(encoder, rows, embedding_columns="b32")
    nested = Dataset.from_dict({"b32": [[row] for row in table.embeds.tolist()]})
    with pytest.raises(ValueError, match="pass image_column=, or embeddings as lists of floating-point numbers"):
        embed_dataset(encoder, nested, embedding_columns={folder: "b32"})


def test_columns_of_other_models_alone_are_said(encoder, make_dataset, table, caplog, tmp_path):
    both = concatenate_datasets([make_dataset(11), table.to_dataset().select_columns(encoder.name_or_path)], axis=1)
    columns = {"openai/clip-vit-bas-patch32": encoder.name_or_path}
    same(embed_dataset(encoder, both, embedding_columns=columns, cache_dir=tmp_path / "other"), table)
    assert "only of openai/clip-vit-bas-patch32: its pictures are embedded" in caplog.text


def test_models_without_a_name_are_not_one_model(table, model_dir, encoder):
    """Neither is a model with tuned words whose base cannot be told."""
    tuned = DualEncoder(get_peft_model(encoder.model, CoOpConfig(n_ctx=2)), encoder.processor, encoder.name_or_path)
    tuned.name_or_path = None
    nameless = FeatureTable(table.embeds, model=ModelId(None, None, "0" * 64))
    with pytest.raises(ValueError, match="are asked for"):
        embed_dataset(tuned, nameless)
