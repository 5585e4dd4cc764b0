"""The presets of studies are the grids that they are said to be."""

from collections import Counter
from pathlib import Path

import pytest

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs.config import (
    CONTROL,
    METHODS,
    RunConfig,
    differences,
    to_json,
)
from compand_jax.experiments.study.grid import (
    FIXED_255,
    FIXED_CALIBRATED,
    LEARNED,
    PER_LAYER,
    STUDIES,
    UNIFORM,
    study_cells,
)
from compand_jax.models import BLOCK_ORDERS

pytestmark = pytest.mark.quick
FIRST, SECOND = BLOCK_ORDERS


def counted(name, **options):
    return Counter(
        (cell.config.model, cell.config.dataset, cell.config.block_order, cell.bits, cell.method,
         cell.mu, cell.config.seed)
        for cell in study_cells(name, **options)
    )  # fmt: skip


def expected(model, dataset, order, bits, methods, seeds):
    """Of one schedule: a control for each seed, and every method at every number of bits."""
    cells = Counter()
    for seed in seeds:
        for method in methods:
            mu = None if method.mu_scope is None else LEARNED
            for count in [None] if method == CONTROL else bits:
                cells[model, dataset, order, count, method, mu, seed] += 1
    return cells


def test_paper():
    wanted = Counter()
    for model in ("alexnet-bn", "vgg19"):
        for dataset in ("cifar10", "cifar100"):
            for order in BLOCK_ORDERS:
                wanted += expected(model, dataset, order, (2, 3, 4, 8), METHODS, range(3))
    assert counted("paper") == wanted
    first = study_cells("paper")[0].config
    assert (first.model, first.dataset) == ("alexnet-bn", "cifar10")
    assert (first.finetune_epochs, study_cells("paper")[0].parent.epochs) == (10, 60)


def test_laptop():
    some = (CONTROL, UNIFORM, PER_LAYER)
    wanted = expected("alexnet-bn", "cifar10", FIRST, (4, 3, 2), METHODS, (0,))
    wanted += expected("alexnet-bn", "cifar10", SECOND, (4,), METHODS, (0,))
    wanted += expected("alexnet-bn", "cifar10", FIRST, (4, 3, 2), some, (1, 2))
    for bits in (4, 2):
        for mu in (FIXED_CALIBRATED, FIXED_255):
            wanted["alexnet-bn", "cifar10", FIRST, bits, PER_LAYER, mu, 0] += 1
    assert counted("laptop") == wanted
    for cell in study_cells("laptop"):
        assert cell.parent.epochs == 20
        assert cell.config.finetune_epochs == 3
        assert cell.config.quant.rules == ()


@pytest.mark.parametrize("checkpoint", [None, Path("resnet20.npz")])
def test_literature(checkpoint):
    cells = study_cells("literature", checkpoint=checkpoint)
    kinds = {(cell.config.model, cell.bits, cell.method) for cell in cells}
    assert kinds == {
        (model, bits, method)
        for model in ("resnet20", "vgg-small")
        for bits, method in [(None, CONTROL),
                             *((b, m) for b in (4, 3, 2) for m in (UNIFORM, PER_LAYER))]
    }  # fmt: skip
    for cell in cells:
        if cell.method != CONTROL:
            ends = [cell.config.quant.at(site) for site in ("conv1", "dense")]
            assert {(end.weight_bits, end.act_bits) for end in ends} == {(8, 8)}
            assert cell.config.quant.at("stage1_block1/conv1").weight_bits == cell.bits
            assert cell.config.quant.grid == ("midrise" if cell.bits == 2 else "midtread")
        imported = cell.config.model == "resnet20" and checkpoint is not None
        assert (cell.parent.state_dict, cell.parent.epochs == 0) == (
            (checkpoint, True) if imported else (None, False)
        )
        assert cell.config.state_dict is None
        assert (cell.config.mean is not None) == imported
        # Every cell has a control that was trained just as it was.
        schedule = ("finetune_learning_rate", "finetune_epochs", "warmup_epochs", "seed")
        same = [getattr(cell.config, name) for name in schedule]
        assert [
            other.name for other in cells
            if other.method == CONTROL and other.parent_name == cell.parent_name
            and [getattr(other.config, name) for name in schedule] == same
        ]  # fmt: skip


def test_short_run_of_vgg19():
    cells = study_cells("vgg19-short")
    assert [(cell.bits, cell.method) for cell in cells] == [
        (None, CONTROL), (4, UNIFORM), (4, PER_LAYER)]  # fmt: skip
    assert {(cell.parent.epochs, cell.config.finetune_epochs) for cell in cells} == {(6, 1)}


def test_levers():
    cells = study_cells("levers")
    assert [cell.name.removeprefix("alexnet-bn-cifar10-conv_norm_act-") for cell in cells[:5]] == [
        "control-lr0.01-seed0",
        "w2a2-uniform-seed0",
        "w2a2-mu_law-per_layer-seed0",
        "w2a2-uniform-standardize-seed0",
        "w2a2-mu_law-per_layer-standardize-seed0",
    ]
    parent = study_cells("laptop")[0].parent
    assert differences(to_json(parent), cells[0].parent, finetune=False) == []
    assert parent.block_order == FIRST
    controls = {cell.levers for cell in cells if cell.method == CONTROL}
    assert controls == {(), ("bn",), ("distill",), ("bn", "distill")}
    for bits in (2, 3):
        own = {(cell.method, cell.levers) for cell in cells if cell.bits == bits}
        names = {levers for _, levers in own}
        assert own == {(method, levers) for method in (UNIFORM, PER_LAYER) for levers in names}
        assert names == {
            (), ("standardize",), ("ends8",), ("transitions",), ("lsq",), ("distill",), ("bn",),
            ("progressive",), ("bn", "distill", "ends8", "standardize"),
        }  # fmt: skip
    for cell in cells:
        config = cell.config
        assert config.finetune_epochs * (1 + len(config.preceding_bits)) == 3
        if cell.method == CONTROL:
            assert config.first_last_bits is None
            assert config.quant == RunConfig().quant


@pytest.mark.parametrize("name", STUDIES)
def test_names_and_parents_are_unambiguous(name):
    cells = study_cells(name)
    assert len({cell.name for cell in cells}) == len(cells)
    parents = {}
    for cell in cells:
        assert parents.setdefault(cell.parent_name, cell.parent) == cell.parent
        own = to_json(cell.config)
        for field in ("model", "dataset", "block_order", "epochs", "learning_rate", "batch_size"):
            assert own[field] == getattr(cell.parent, field)


def test_networks_alone():
    cells = study_cells("literature", networks=("vgg-small",))
    assert {cell.config.model for cell in cells} == {"vgg-small"}
    message = "`networks` must be of resnet20, vgg-small, got vgg19: correct it"
    with pytest.raises(UserError, match=message):
        study_cells("literature", networks=("vgg19",))


def test_wrong_preset_and_checkpoint():
    with pytest.raises(UserError, match="`preset` must be one of paper, .*, got 'x': choose one"):
        study_cells("x")
    with pytest.raises(UserError, match="`checkpoint` must go with the preset literature, got la"):
        study_cells("laptop", checkpoint=Path("x.npz"))
