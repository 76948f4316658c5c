"""The teacher's features are those of its model, in the student's order, masked for items that it does not support."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.closeness import assert_sums_close, transformer_terms
from tests.support.teachers import CPU, WIDTH, drawn_pack, frames_of, image_model, own_encoder, teacher_of
from univitar_ds.config.model import TeacherConfig
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.kernels.reference import PATCH, normalise, patchify
from univitar_ds.model.teacher.teacher import FAMILIES, HALF, IMAGENET, build_teacher, read_teacher

KINDS = ["dinov2", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model", "siglip2_vision_model"]
NORMS = {kind: HALF if "siglip" in kind else IMAGENET for kind in KINDS}
STILLS = [(1, 4, 4), (1, 2, 6), (1, 4, 4), (1, 3, 2)]
VIDEOS = [(2, 2, 4), (1, 4, 2), (3, 2, 4)]


def by_hand(model, kind, frames):
    """One batch of raw frames (B, rows, columns, 3) through transformers: (B, h * w, D), (B, D)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMS[kind])
    values = (frames.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        if kind == "siglip2_vision_model":
            from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

            patch = model.config.patch_size
            rows = torch.stack([torch.from_numpy(convert_image_to_patches(one.numpy(), patch)) for one in values])
            shape = torch.tensor([[values.shape[2] // patch, values.shape[3] // patch]] * len(values))
            out = model(rows, torch.ones(rows.shape[:2], dtype=torch.int64), shape)
            return out.last_hidden_state, out.pooler_output
        if kind == "siglip_vision_model":
            out = model(values, interpolate_pos_encoding=True)
            return out.last_hidden_state, out.pooler_output
        out = model(values)
        h, w = (side // model.config.patch_size for side in values.shape[2:])
        return out.last_hidden_state[:, -h * w :], out.last_hidden_state[:, 0]


def counted(teacher):
    """A list that grows by the batch size whenever the teacher's model runs."""
    runs = []
    teacher.tower.model.register_forward_hook(
        lambda model, args, kwargs, out: runs.append(len(args or next(iter(kwargs.values())))), with_kwargs=True
    )
    return runs


def close(got, wanted):
    """By the longest way through any of the teachers: 16 x 16 pixels of 3 channels, two blocks, a head that pools."""
    blocks = transformer_terms(width=64, inner=128, head=64, layers=3, longest=48)
    assert_sums_close(got, wanted, 768 + blocks)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_images_have_the_features_of_the_model_called_by_hand(kind, tmp_path):
    model, pack = image_model(kind), drawn_pack(STILLS)
    teacher = teacher_of(model, tmp_path)
    found = teacher(*pack)
    wanted = [by_hand(model, kind, item) for item in frames_of(*pack)]
    close(found.patches, torch.cat([patches[0] for patches, _ in wanted]))
    close(found.pooled, torch.cat([pooled for _, pooled in wanted]))
    assert teacher.width == found.patches.shape[1] == found.pooled.shape[1] == WIDTH
    assert found.valid.all()
    assert found.supported.all()
    assert len(found.valid) == len(found.patches)
    assert found.patches.std() > 0.1, "features without life prove nothing"


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_video_are_means_over_the_frames_of_each_token(kind, tmp_path):
    model, pack = image_model(kind), drawn_pack(VIDEOS, videos=True)
    found = teacher_of(model, tmp_path)(*pack)
    patches, pooled = [], []
    for item in frames_of(*pack):
        frames, heads = zip(*(by_hand(model, kind, item[i : i + 1]) for i in range(len(item))), strict=True)
        patches += [(frames[i][0] + frames[i + 1][0]) / 2 for i in range(0, len(item), 2)]
        pooled.append(torch.cat(heads).mean(0))
    close(found.patches, torch.cat(patches))
    close(found.pooled, torch.stack(pooled))


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["dinov3_vit", "siglip2_vision_model"])
@pytest.mark.parametrize("patch", [8, 16])
def test_a_teacher_of_another_patch_size_sees_frames_resized_to_the_same_grid(kind, patch, tmp_path):
    model, pack = image_model(kind, patch_size=patch), drawn_pack([(1, 3, 5)])
    raw = frames_of(*pack)[0]
    size = (3 * patch, 5 * patch)
    resized = F.interpolate(raw.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
    wanted, _ = by_hand(model, kind, resized.permute(0, 2, 3, 1))
    close(teacher_of(model, tmp_path)(*pack).patches, wanted[0])


@pytest.mark.parametrize("videos", [False, True])
def test_tokens_come_in_the_order_in_which_the_student_cuts_its_patches(videos, tmp_path):
    grids = [(2, 4, 6), (1, 2, 4)] if videos else [(1, 4, 6), (1, 2, 4)]
    pack = drawn_pack(grids, videos=videos)
    model = image_model("dinov2")
    plain = teacher_of(model, tmp_path / "a")(*pack).patches
    merged = teacher_of(model, tmp_path / "b", merge=2)(*pack).patches
    place = 0
    for frames, (t, h, w) in zip(pack[1].tolist(), grids, strict=True):
        # Each patch of these images has its own number as colour, which shows where patchify puts it.
        numbers = torch.arange(h * w, dtype=torch.uint8).view(1, h, 1, w, 1, 1)
        painted = numbers.expand(frames, h, PATCH, w, PATCH, 3).reshape(-1)
        order = patchify(painted, [frames], [(t, h, w)], 2)[:, 0].view(t, -1).long()
        assert not torch.equal(order[0], torch.arange(h * w))
        for step in range(t):
            rows = slice(place, place + h * w)
            assert torch.equal(merged[rows], plain[rows][order[step]])
            place += h * w


def test_images_of_one_size_run_as_one_batch(tmp_path):
    teacher = teacher_of(image_model("dinov2"), tmp_path)
    runs = counted(teacher)
    pack = drawn_pack(STILLS)
    teacher(*pack)
    assert sorted(runs) == [1, 1, 2]
    assert teacher.num_forwards(pack[2]) == 3


def packing(teacher):
    """Makes the teacher of a CPU run whole packs, as on a GPU, and returns the number of tokens of each pass."""
    tower, passes = teacher.tower, []
    tower.packing = FAMILIES[tower.model.config.model_type].packing
    blocks = max((one for one in tower.model.modules() if isinstance(one, nn.ModuleList)), key=len)
    blocks[0].register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[:2].numel()))
    return passes


@pytest.mark.numeric
@pytest.mark.parametrize("videos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_runs_in_one_pass_with_the_features_of_its_items(kind, videos, tmp_path):
    pack = drawn_pack(VIDEOS if videos else STILLS, videos=videos)
    by_size, whole = (teacher_of(image_model(kind), tmp_path) for _ in range(2))
    passes = packing(whole)
    wanted, found = by_size(*pack), whole(*pack)
    close(found.patches, wanted.patches)
    close(found.pooled, wanted.pooled)
    prefix = {"dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 3}.get(kind, 0)
    frames = zip(pack[1].tolist(), pack[2].tolist(), strict=True)
    assert passes == [sum(count * (prefix + h * w) for count, (_, h, w) in frames)]
    assert whole.num_forwards(pack[2]) == 1
    assert by_size.num_forwards(pack[2]) == (2 if videos else 3)
    close(by_size(*pack).patches, wanted.patches)


def test_an_empty_pack_needs_no_pass(tmp_path):
    teacher = teacher_of(image_model("dinov2"), tmp_path)
    passes = packing(teacher)
    pack = drawn_pack([])
    assert teacher(*pack).patches.shape == (0, WIDTH)
    assert (passes, teacher.num_forwards(pack[2])) == ([], 0)


class Operations(TorchDispatchMode):
    """Counts those that do something: on a GPU each is a launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_needs_no_additional_operation_and_has_the_bits_of_the_models_output(kind, tmp_path):
    teacher = teacher_of(image_model(kind), tmp_path, dtype="bf16")
    outputs, counts = [], []
    run = teacher.tower.run
    teacher.tower.run = lambda model, frames: outputs.append(run(model, frames)) or outputs[-1]
    for stills in (4, 16):
        with Operations() as seen:
            found = teacher(*drawn_pack([(1, 3, 2)] * stills))
        counts.append(seen.count)
        patches, pooled = outputs[-1]
        assert torch.equal(found.patches, patches.flatten(0, 1))
        assert torch.equal(found.pooled, pooled)
    if kind != "siglip2_vision_model":  # whose model loops over images itself
        assert counts[0] == counts[1]


def test_pixels_on_the_device_are_used_there(tmp_path):
    pack = drawn_pack([(2, 4, 2), (1, 2, 2)], videos=True)
    teacher = teacher_of(image_model("dinov2"), tmp_path / "a")
    wanted = teacher(*pack)
    absent = torch.empty_like(pack[0], device="meta")
    found = teacher(absent, *pack[1:], device_pixels=pack[0])
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    cached = teacher_of(image_model("dinov2"), tmp_path / "b", cache=str(tmp_path / "cache"))
    for pixels in (pack[0], absent):  # the second time nothing is missing, so nothing is taken
        found = cached(*pack, device_pixels=pixels)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.numeric
@pytest.mark.parametrize("own_merge", [1, 2])
@pytest.mark.parametrize("merge", [1, 2])
def test_an_exported_encoder_is_a_teacher_with_its_own_tokens(own_merge, merge, tmp_path):
    encoder = own_encoder(spatial_merge_size=own_merge, image_mean=(0.1, 0.2, 0.3))
    pack = drawn_pack([(2, 4, 6), (1, 2, 4)], videos=True)
    pixels, frames, grids = pack
    found = teacher_of(encoder, tmp_path, merge=merge)(*pack)
    config = encoder.config
    rows = normalise(patchify(pixels, frames.tolist(), grids.tolist(), own_merge), config.image_mean, config.image_std)
    with torch.no_grad():
        tokens = encoder(rows, grids)
    # The patches identify the tokens: the order of one patchify is found in that of the other.
    cut = patchify(pixels, frames.tolist(), grids.tolist(), merge)
    for row, wanted in zip(patchify(pixels, frames.tolist(), grids.tolist(), own_merge), tokens, strict=True):
        place = int((cut == row).all(1).nonzero())
        close(found.patches[place], wanted)
    close(found.pooled, torch.stack([part.mean(0) for part in tokens.split([48, 8])]))


@pytest.mark.numeric
def test_items_whose_grid_the_teacher_does_not_support_are_masked_and_others_are_not_changed(tmp_path):
    teacher = teacher_of(own_encoder(spatial_merge_size=2), tmp_path)
    grids = [(1, 2, 3), (1, 4, 2), (1, 3, 4), (1, 2, 2)]
    pack = drawn_pack(grids)
    found = teacher(*pack)
    assert found.supported.tolist() == teacher.supports(pack[2]) == [False, True, False, True]
    assert found.valid.tolist() == [False] * 6 + [True] * 8 + [False] * 12 + [True] * 4
    assert not found.patches[~found.valid].any()
    assert not found.pooled[~found.supported].any()
    items = frames_of(*pack)
    alone = teacher(torch.cat([items[1].flatten(), items[3].flatten()]), torch.ones(2).long(), pack[2][[1, 3]])
    close(found.patches[found.valid], alone.patches)
    assert teacher.num_forwards(pack[2]) == 1
    assert teacher.num_forwards(pack[2][:1]) == 0


@pytest.mark.parametrize("kind", ["dinov2", "own"])
def test_a_pack_without_items_has_no_features(kind, tmp_path):
    model = own_encoder() if kind == "own" else image_model(kind)
    found = teacher_of(model, tmp_path)(*drawn_pack([]))
    assert found.patches.shape[0] == found.pooled.shape[0] == len(found.valid) == len(found.supported) == 0


@pytest.mark.parametrize("kind", ["siglip2_vision_model", "own"])
def test_a_rank_with_fewer_sizes_runs_as_often_as_requested_with_the_same_features(kind, tmp_path):
    teacher = teacher_of(own_encoder(spatial_merge_size=2) if kind == "own" else image_model(kind), tmp_path)
    runs, pack = counted(teacher), drawn_pack([(1, 2, 2)])
    plain, more = teacher(*pack), teacher(*pack, min_forwards=4)
    assert len(runs) == 1 + 4
    assert all(torch.equal(a, b) for a, b in zip(plain, more, strict=True))
    teacher(*drawn_pack([]), min_forwards=2)
    assert len(runs) == 1 + 4 + 2


@pytest.mark.parametrize("kind", [*KINDS, "own"])
def test_a_teacher_is_frozen_and_runs_in_bf16_unless_asked_otherwise(kind, tmp_path):
    model = own_encoder() if kind == "own" else image_model(kind)
    pack = drawn_pack(STILLS)
    wide = teacher_of(model, tmp_path)(*pack)
    model.save_pretrained(tmp_path)
    teacher = build_teacher(TeacherConfig(path=str(tmp_path)), merge=1, device=CPU)
    assert not any(parameter.requires_grad for parameter in teacher.tower.model.parameters())
    assert not teacher.tower.model.training
    found = teacher(*pack)
    assert found.patches.dtype == found.pooled.dtype == teacher.dtype == torch.bfloat16
    assert not found.patches.requires_grad
    assert F.cosine_similarity(found.patches.float(), wide.patches, dim=-1).min() > 0.99


def test_the_frequencies_of_rotary_positions_are_not_rounded_to_bf16(tmp_path):
    image_model("dinov3_vit").save_pretrained(tmp_path)
    teacher = build_teacher(TeacherConfig(path=str(tmp_path)), merge=1, device=CPU)
    assert teacher.tower.model.rope_embeddings.inv_freq.dtype == torch.float32


@pytest.mark.numeric
def test_the_vision_tower_of_a_two_tower_folder_is_a_teacher(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    alone = image_model("siglip_vision_model")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = SiglipModel(SiglipConfig(vision_config=alone.config.to_dict(), text_config=text))
    whole.vision_model.load_state_dict(alone.state_dict())
    pack = drawn_pack(STILLS)
    close(teacher_of(whole, tmp_path / "two")(*pack).patches, teacher_of(alone, tmp_path / "one")(*pack).patches)


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        (None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"image_mean": [0.1, 0.2, 0.3]}, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225)),
        ({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_normalization_is_that_of_the_preprocessor_file_or_else_of_the_family(preprocessor, mean, std, tmp_path):
    image_model("dinov2").save_pretrained(tmp_path)
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    shape = read_teacher(TeacherConfig(path=str(tmp_path)))
    assert (shape.mean, shape.std, shape.width, shape.patch) == (mean, std, WIDTH, PATCH)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_type": "bert"}, "holds a bert model; supported are: dinov2"),
        ({"model_type": "siglip_text_model"}, "holds a siglip_text_model model"),
        ({"model_type": "dinov3_convnext"}, "holds a dinov3_convnext model"),
        ({"model_type": "dinov2", "patch_size": None}, "Validation error for field 'patch_size'"),
        ({"model_type": "dinov2", "patch_size": [14, 16]}, r"has patch_size \[14, 16\]; a teacher needs square"),
        ({"model_type": "dinov2", "num_channels": 1}, "takes 1 channels; images have 3"),
    ],
)
def test_an_unsupported_teacher_is_refused_before_its_weights_are_read(content, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises((ConfigError, CheckpointError), match=said):
        read_teacher(TeacherConfig(path=str(tmp_path)))


def test_a_missing_or_empty_folder_is_one_error_message(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"neither a folder with a model's config\.json nor the name of a"):
            read_teacher(TeacherConfig(path=str(path)))


def test_a_teacher_without_all_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    image_model("dinov2").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights: layernorm\.weight"):
        build_teacher(TeacherConfig(path=str(tmp_path)), merge=1, device=CPU)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_teacher(TeacherConfig(path=str(tmp_path)), merge=1, device=CPU)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_cache_gives_the_same_bits_without_running_the_model(dtype, tmp_path):
    settings = {"dtype": dtype, "cache": str(tmp_path / "cache"), "merge": 2}
    pack = drawn_pack([(2, 4, 2), (1, 2, 2), (2, 4, 2)], videos=True)
    model = image_model("dinov2")
    first = teacher_of(model, tmp_path / "a", **settings)
    made = first(*pack)
    again = teacher_of(model, tmp_path / "moved", **settings)
    runs = counted(again)
    kept = again(*pack)
    assert runs == []
    assert all(torch.equal(a, b) for a, b in zip(made, kept, strict=True))
    plain = teacher_of(model, tmp_path / "a", dtype=dtype, merge=2)(*pack)
    assert all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))


@pytest.mark.numeric
def test_the_cache_distinguishes_other_pixels_and_other_weights(tmp_path):
    pack, other = drawn_pack([(1, 2, 2)]), drawn_pack([(1, 2, 2)], seed=1)
    model, cache = image_model("dinov2"), str(tmp_path / "cache")
    teacher = teacher_of(model, tmp_path / "a", cache=cache)
    teacher(*pack)
    runs = counted(teacher)
    teacher(*other)
    assert len(runs) == 1
    model.layernorm.bias.data += 1
    changed = teacher_of(model, tmp_path / "b", cache=cache)(*pack)
    close(changed.patches, by_hand(model, "dinov2", frames_of(*pack)[0])[0][0])


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path):
    pack = drawn_pack([(1, 2, 2)])
    teacher = teacher_of(image_model("dinov2"), tmp_path / "a", cache=str(tmp_path / "cache"))
    made = teacher(*pack)
    [file] = (tmp_path / "cache").rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert torch.equal(teacher(*pack).patches, made.patches)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_reported_once_and_not_used(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    teacher = teacher_of(image_model("dinov2"), tmp_path / "a", cache=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert teacher(*drawn_pack(STILLS)).patches.any()
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
