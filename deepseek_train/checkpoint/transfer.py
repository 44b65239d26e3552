"""The tensors' way to disk and back, through the planner and storage classes of torch.distributed.checkpoint
(DCP).

DCP writes one file for each rank and an index, ``.metadata``. Its own ``save`` and ``load`` take these same
steps, but send exceptions between ranks as pickles, which fails under Python 3.13 with torch 2.11 and leaves
the other ranks waiting.

The index is a pickle, and unpickling runs code. ``store`` checks it against the manifest before it is read
here, which guards against damage, not against a forger, who would change both: load only from where you would
run programs from.
"""

from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from deepseek_train.checkpoint.agree import own_rank, together
from deepseek_train.checkpoint.manifest import FileRecord, measure
from deepseek_train.checkpoint.pieces import Snapshot
from deepseek_train.checkpoint.planner import PieceLoadPlanner, PieceSavePlanner

INDEX = ".metadata"


def write_tensors(folder: Path, snapshot: Snapshot) -> dict[str, FileRecord]:
    """Write all ranks' tensors into an empty folder, fsynced. Rank 0 gets the record of every file.
    Collective."""
    writer, planner = FileSystemWriter(folder), PieceSavePlanner(snapshot)

    def propose() -> SavePlan:
        writer.set_up_storage_writer(own_rank() == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    def settle(proposals: list[SavePlan]) -> list[SavePlan]:
        plans, _ = planner.create_global_plan(proposals)
        return writer.prepare_global_plan(plans)

    plan = together(propose, settle)

    def write() -> tuple[list[WriteResult], dict[str, FileRecord]]:
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        return results, {path.name: measure(path) for path in folder.glob(f"__{own_rank()}_*")}

    def finish(written: list[tuple[list[WriteResult], dict[str, FileRecord]]]) -> list[dict[str, FileRecord]]:
        assert planner.metadata is not None
        writer.finish(planner.metadata, [results for results, _ in written])
        files = {name: record for _, own in written for name, record in own.items()}
        files[INDEX] = measure(folder / INDEX)
        return [files, *({} for _ in written[1:])]

    return together(write, finish)


def read_tensors(folder: Path, snapshot: Snapshot) -> None:
    """Fill all ranks' tensors in place, whichever ranks wrote them. Nothing is touched unless all fit.
    Collective."""
    reader, planner = FileSystemReader(folder), PieceLoadPlanner(snapshot)

    def propose() -> LoadPlan:
        metadata = reader.read_metadata()
        planner.set_up_planner({}, metadata, own_rank() == 0)
        reader.set_up_storage_reader(metadata, own_rank() == 0)
        return reader.prepare_local_plan(planner.create_local_plan())

    plan = together(propose, planner.create_global_plan)
    together(lambda: reader.read_data(planner.finish_plan(plan), planner).wait(), lambda nothings: nothings)
