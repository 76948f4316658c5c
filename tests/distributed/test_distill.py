"""Distillation in a step on several ranks, compared with plain torch on all packs at once."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.closeness import assert_sums_close, gradient_terms, transformer_terms
from tests.support.dense import dense_sigmoid
from tests.support.distributed import run_distributed
from tests.support.standin import LANES, Pack, inputs
from tests.support.teachers import CPU, drawn_pack, image_model, own_encoder
from tests.support.training import ds_config
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import ModelConfig, ObjectiveConfig, TeacherConfig, TextConfig
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import read_full
from univitar_ds.geometry import token_count
from univitar_ds.model.blocks.dropping import NO_DROPPING, DropConfig
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.teacher.teacher import build_teacher, read_teacher
from univitar_ds.model.towers import build_text_tower
from univitar_ds.training.checkpoint.sharded import save_checkpoint
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.step.train_step import StepSettings, train_step

pytestmark = pytest.mark.distributed
WEIGHT = 0.7
GRIDS = [
    [(1, 2, 3), (1, 4, 2), (1, 2, 3), (1, 3, 3)],
    [(1, 5, 2), (1, 2, 2)],
    [],
    [(1, 4, 4), (1, 1, 2), (1, 2, 1)],
]
"""Items of each lane. Ranks have different numbers of items, of sizes, and of items that a merging teacher supports."""
VIDEOS = [[(2, 2, 3)], [(1, 2, 2), (3, 2, 2)], [(2, 4, 2)], [(1, 1, 4)]]
CASES = {
    "cosine": (GRIDS, {"model": "dinov2"}),
    "smooth l1": (VIDEOS, {"model": "dinov2", "patch_loss": "smooth_l1", "pooled_loss": "smooth_l1"}),
    "own, masked": (GRIDS, {"model": "own", "patch_weight": 2.0, "pooled_weight": 0.5}),
    "partitioned": (GRIDS, {"model": "dinov2", "partitioned": True}),
    "own, partitioned": (GRIDS, {"model": "own", "partitioned": True}),
    "dropped": (GRIDS, {"model": "dinov2"}),
    "dropped, masked": (GRIDS, {"model": "own"}),
}
TERMS = gradient_terms(
    1176 + transformer_terms(width=64, inner=96, head=64, layers=3, longest=24),
    sum(t * h * w for items in GRIDS for t, h, w in items),
)
"""`terms` of a gradient: two blocks and the pooling, or fewer; the last sums are over the tokens of all lanes."""
DROPPING = DropConfig(patches=0.5, depth=0.4, blocks=2, seed=1, step=6)
"""Dropping in the cases of that name."""


def student(width: int | None) -> ContrastiveModel:
    text = TextConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, context_length=8)
    shape = EncoderConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = UniViTAR(shape)
        tower = build_text_tower(text, vocab_size=50, eos_id=2, pad_id=0)
        return ContrastiveModel(vision, tower, ModelConfig(text=text, embed_dim=16, pool_heads=2), width)


def packs(items) -> list[Pack]:
    made = []
    for lane, grids in enumerate(items):
        pixels, frames, grid_thw = drawn_pack(grids, videos=items is VIDEOS, seed=lane)
        g = torch.Generator().manual_seed(lane)
        ids = torch.randint(3, 50, (len(grids), 5), generator=g)
        made.append(Pack(pixels, frames, grid_thw, ids, torch.full((len(grids),), 5), torch.arange(len(grids)), lane))
    return made


def teacher_config(folder, model: str, **settings) -> TeacherConfig:
    return TeacherConfig(path=str(folder / model), dtype="fp32", **settings)


def dropping_of(name: str) -> DropConfig:
    return DROPPING if name.startswith("dropped") else NO_DROPPING


def dense(folder, items, settings, dropping):
    """(losses, agreement, gradients) of all packs in one process, computed by the formulas."""
    config = teacher_config(folder, **{k: v for k, v in settings.items() if k != "partitioned"})
    teacher = build_teacher(config, merge=1, device=CPU)
    model, batches = student(teacher.width), packs(items)
    drops = [dropping.of_pack(batch.grid_thw.tolist(), batch.lane) for batch in batches]
    outputs = [model(*inputs(batch), True, dropped) for batch, dropped in zip(batches, drops, strict=True)]
    vision, text = (torch.cat([output[i] for output in outputs]) for i in (0, 1))
    contrastive = dense_sigmoid(vision, text, outputs[0].scale, outputs[0].bias)
    found = [teacher(batch.pixels, batch.frames, batch.grid_thw) for batch in batches]
    valid, taken = torch.cat([f.valid for f in found]), torch.cat([f.supported for f in found])
    patches = torch.cat([f.patches for f in found])
    if dropping is not NO_DROPPING:
        starts = [sum(map(token_count, (g for grids in items[:lane] for g in grids))) for lane in range(LANES)]
        kept = torch.cat([start + dropped.kept for start, dropped in zip(starts, drops, strict=True)])
        patches, valid = patches[kept], valid[kept]
        assert 0 < valid.sum() < sum(len(f.valid) for f in found)
    pairs = [
        (torch.cat([o.distilled.patches for o in outputs])[valid], patches[valid]),
        (torch.cat([o.distilled.pooled for o in outputs])[taken], torch.cat([f.pooled for f in found])[taken]),
    ]
    assert taken.sum() > 0
    terms = []
    for kind, (ours, theirs) in zip((config.patch_loss, config.pooled_loss), pairs, strict=True):
        agreement = F.cosine_similarity(ours, theirs).mean()
        terms.append(1 - agreement if kind == "cosine" else F.smooth_l1_loss(ours, theirs))
    loss = contrastive + WEIGHT * (config.patch_weight * terms[0] + config.pooled_weight * terms[1])
    loss.backward()
    names = ("contrastive", "distill_patch", "distill_pooled")
    losses = {name: term.item() for name, term in zip(names, (contrastive, *terms), strict=True)}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), losses, F.cosine_similarity(*pairs[0]).mean().item(), gradients


def engine_for(world, width: int | None, stage: int):
    """An engine without clipping and momentum, so that Adam's first moment is the gradient after a step."""
    content = {**ds_config(LANES // world.size, stage=stage), "gradient_clipping": 0.0}
    return build_engine(student(width), OptimizerConfig(betas=(0.0, 0.98)), content, world)


def gradient_pieces(engine):
    return [
        (piece.name, piece.shape, piece.start, piece.tensors["exp_avg"].clone())
        for piece in engine.pieces()
        if "exp_avg" in piece.tensors
    ]


def on_ranks(folder, cases, stage, keep):
    """(result, pieces of the gradient, forward passes of the teacher) for each case. The learning rate is 0."""
    world = start_world()
    answers, engines = {}, {}
    for name in cases:
        items, settings = CASES[name]
        config = teacher_config(folder, **settings)
        teacher = build_teacher(config, merge=1, device=world.device)
        if teacher.width not in engines:
            engines[teacher.width] = engine_for(world, teacher.width, stage)
        engine = engines[teacher.width]
        runs = []
        teacher.tower.model.register_forward_hook(lambda *_, seen=runs: seen.append(1))
        mine = [packs(items)[lane] for lane in world.lanes(LANES)]
        objective = ObjectiveConfig(chunk=5, teacher=config)
        settings = StepSettings(0.0, distill_weight=WEIGHT, keep=keep, dropping=dropping_of(name))
        result = train_step(engine, mine, settings, objective, teacher)
        answers[name] = result, gradient_pieces(engine), len(runs), held(teacher)
        assert all(parameter.grad is None for parameter in teacher.tower.model.parameters())
    first = engines[32]
    count = len(runs)
    quiet = train_step(first, mine, StepSettings(0.0), objective, teacher)
    answers["weight 0"] = quiet, gradient_pieces(first), len(runs) - count, 0
    saved = sorted(read_full(save_checkpoint(first, folder / f"{world.size}-{stage}", 1, {}, {}, keep=1)))
    for engine in engines.values():
        engine.close()
    return answers, saved


def held(teacher) -> int:
    """Number of elements of the teacher's weights on this rank."""
    weights = teacher.tower.model.parameters()
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    image_model("dinov2").save_pretrained(root / "dinov2")
    own_encoder(spatial_merge_size=2).save_pretrained(root / "own")
    return root


@pytest.fixture(scope="module")
def wanted(folder):
    return {name: dense(folder, *case, dropping_of(name)) for name, case in CASES.items()}


def whole(answers, name):
    """The gradient by parameter, joined over ranks."""
    found = {}
    for ranks, _ in answers:
        for parameter, shape, start, part in ranks[name][1]:
            flat = found.setdefault(parameter, torch.full((math.prod(shape),), torch.nan))
            flat[start : start + len(part)] = part
            found[parameter] = flat
    return found


def assert_follows(answers, wanted, name):
    loss, losses, agreement, gradients = wanted[name]
    for ranks, _ in answers:
        result = ranks[name][0]
        assert result == answers[0][0][name][0], "ranks have different results"
        assert_sums_close(result.loss, loss, TERMS, "loss")
        assert result.losses.keys() == losses.keys()
        for kind, wanted_loss in losses.items():
            assert_sums_close(result.losses[kind], wanted_loss, TERMS, kind)
        # Cosines of an untrained student cancel to almost nothing, so the distances are compared.
        assert_sums_close(1 - result.agreement, 1 - agreement, TERMS, "1 - agreement")
    found = whole(answers, name)
    assert found.keys() == gradients.keys()
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert_sums_close(answers[0][0][name][0].grad_norm, norm, TERMS, "gradient norm")
    for parameter, gradient in gradients.items():
        mine = found[parameter].view_as(gradient)
        if parameter.endswith("k_proj.bias"):  # softmax cancels it: 0 up to rounding of sums as the weight's
            scale = gradients[parameter.replace("bias", "weight")].abs().max().item()
            assert_sums_close(mine, torch.zeros_like(mine), TERMS, parameter, scale=scale)
        else:
            assert_sums_close(mine, gradient, TERMS, parameter)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, 3, 3), id="1 rank, 3 of 4 packs run once"),
        pytest.param((2, 3, 1), id="2 ranks", marks=pytest.mark.numeric),
        pytest.param((2, 2, 1), id="2 ranks, zero2", marks=pytest.mark.numeric),
        pytest.param((4, 3, 1), id="4 ranks", marks=pytest.mark.slow),
        pytest.param((4, 3, 0), id="4 ranks, two passes"),
    ],
)
def answers(request, folder):
    ranks, stage, keep = request.param
    names = list(CASES) if stage == 3 and keep else ["cosine", "partitioned", "dropped"]
    return run_distributed(on_ranks, ranks, folder, names, stage, keep)


def test_the_gradient_on_any_number_of_ranks_is_that_of_one_process(answers, wanted):
    for name in CASES:
        if name in answers[0][0]:
            assert_follows(answers, wanted, name)


def test_a_partitioned_teacher_equals_a_whole_one_bit_for_bit_and_each_rank_holds_its_share(answers):
    (plain, _, _, everything), (shared, _, _, mine) = (answers[0][0][name] for name in ("cosine", "partitioned"))
    assert plain == shared
    ours, theirs = whole(answers, "cosine"), whole(answers, "partitioned")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    runs = {ranks["partitioned"][2] for ranks, _ in answers}
    assert len(runs) == 1, "ranks hang if they run a partitioned teacher unequally often"
    shares = [ranks["partitioned"][3] for ranks, _ in answers]
    assert sum(shares) == everything
    assert mine <= everything / len(answers) * 1.2


def test_at_weight_zero_the_teacher_does_not_run_and_its_heads_get_no_gradient(answers):
    found = whole(answers, "weight 0")
    for ranks, _ in answers:
        result, _, runs, _ = ranks["weight 0"]
        assert runs == 0
        assert result.agreement is None
        assert result.losses == {"contrastive": result.loss}
    before = whole(answers, "cosine")
    for name in before:
        if name.startswith("distill."):
            assert before[name].any()
            assert not found[name].any()
    assert found["vision_proj.weight"].any()


def test_the_heads_are_in_the_checkpoint_and_the_teacher_is_not(answers, folder):
    width = read_teacher(teacher_config(folder, "dinov2")).width
    assert all(saved == sorted(student(width).state_dict()) for _, saved in answers)
