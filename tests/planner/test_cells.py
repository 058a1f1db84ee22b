"""Cells: what a mesh and its microbatches decide is priced once for all memory modes."""

import numpy as np
import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.backends import installed_cpu
from piperjax.planner.candidates import MEMORY_MODES, Mesh, Question, Rejections
from piperjax.planner.cells import groups, memory_backend, ways_on
from piperjax.planner.kept import kept_bytes
from piperjax.planner.network import DISPATCHERS, ways
from piperjax.planner.scoring import score

FRONTIER = load_platform("frontier")


def asked(platform=FRONTIER, **options):
    options = {"num_devices": 64, "batch_size": 256, "seq_len": 4096} | options
    return Question(model=preset("deepseek_v3"), platform=platform, **options)


def test_cells_are_grouped_by_ranks_and_microbatches():
    found = list(groups(asked(), [Mesh(2, 4, 8), Mesh(2, 2, 16), Mesh(4, 2, 8)]))
    keys = [{(cell.mesh.pipe, cell.num_microbatches) for cell in cells} for cells in found]
    assert all(len(key) == 1 for key in keys)
    # Eight sequences: 1, 2, 4, 8; on four ranks sixteen: 2, 4, 8, 16.
    cells = {(cell.mesh, cell.num_microbatches) for of_group in found for cell in of_group}
    assert len(cells) == 4 + 4 + 4
    assert {cell.index for cells in found for cell in cells} == {0, 1, 2}


def test_more_is_kept_and_less_is_recomputed_mode_by_mode():
    cell = next(groups(asked(wished={"num_microbatches": 4}), [Mesh(2, 4, 8)]))[0]
    assert cell.layers.shape == (len(MEMORY_MODES), 4, 7)
    question = asked()
    layers = question.model.kinds.values()
    kept = [
        [kept_bytes(question.model.d_model, layer, cell.share, mode) for layer in layers]
        for mode in MEMORY_MODES
    ]
    assert np.all(np.diff(kept, axis=0) >= 0)
    backward, last = np.split(cell.layers[..., 1], 2, axis=1)
    # The last layer of a stage that is run again counts as one that keeps its input.
    np.testing.assert_array_equal(last, [backward[1], *backward[1:]])
    stage, layer, named, products, stash = backward
    assert np.all(stage > layer) and np.all(layer > products) and np.all(layer > stash)
    # What "named" saves is exchanges, for the reading of what it kept.
    assert np.all(named < 1.02 * layer)
    # Splitting a backward in two costs, never saves.
    assert np.all(cell.layers[..., 1] <= (cell.layers[..., 2] + cell.layers[..., 3]) * (1 + 1e-9))


def test_the_quickest_dispatcher_is_taken():
    flat = next(groups(asked(wished={"num_microbatches": 4}), [Mesh(2, 1, 32)]))[0]
    any_of = asked(wished={"num_microbatches": 4}, dispatchers=tuple(DISPATCHERS))
    quickest = next(groups(any_of, [Mesh(2, 1, 32)]))[0]
    assert quickest.layers[..., 4].sum() <= flat.layers[..., 4].sum()
    assert quickest.way in ways(DISPATCHERS)
    given = asked(wished={"num_microbatches": 4, "dispatch": "halo2", "dispatch_chunks": 2})
    assert next(groups(given, [Mesh(2, 1, 32)]))[0].way == ("halo2", 2)


def test_the_leanest_dispatcher_is_tried_beside_the_quickest():
    question = asked(wished={"num_microbatches": 4})
    (cells,) = groups(question, [Mesh(2, 1, 32)])
    quickest, leanest = cells
    assert quickest.layers[..., :6].sum() < leanest.layers[..., :6].sum()
    needed = {way: bytes_with(question, *way) for way in ways_on(question, Mesh(2, 1, 32), 8192)}
    assert needed[leanest.way] == min(needed.values()) < needed[quickest.way]


def bytes_with(question, dispatch, chunks):
    wished = {"num_microbatches": 4, "dispatch": dispatch, "dispatch_chunks": chunks, "memory_mode": "layer"}
    given = asked(wished=wished | {"schedule": "1f1b", "vocabulary": "split", "overlap": False})
    return score(given, [Mesh(2, 1, 32)], Rejections()).all_bytes([0]).item()


@pytest.mark.parametrize(("name", "backend"), [("frontier", "gpu"), ("cpu8", installed_cpu())])
def test_simulated_devices_are_cpus(name, backend):
    assert memory_backend(asked(load_platform(name), num_devices=8, batch_size=8)) == backend
