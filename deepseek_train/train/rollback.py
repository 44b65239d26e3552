"""Back to a checkpoint from before a row of skipped steps, and past the data of that row.

What decides is in the checkpoint's facts and in the data, so a run that is interrupted after a rollback, before its
next checkpoint, resumes from the same checkpoint, meets the same row and does the same again.
"""

from dataclasses import replace

from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.store import newest_good
from deepseek_train.data.windows import Window
from deepseek_train.monitor.events import EVENTS_FILE, Event
from deepseek_train.train.build import Job
from deepseek_train.train.guard import GuardError
from deepseek_train.train.observer import Observer
from deepseek_train.train.state import Progress, load_checkpoint


def skipped_window(progress: Progress) -> Window:
    """The sequences of the row of skipped steps that ``progress`` ends with."""
    cursor, start = progress.cursor, progress.guard.row_start
    return Window(cursor.number(start), cursor.number(cursor.consumed_sequences - 1) + 1)


def roll_back(job: Job, root: Place, progress: Progress, observer: Observer) -> Progress:
    """Puts the newest checkpoint in ``root`` from before the row into the job (collective); returns its progress, with
    the row's data among the windows to jump over.

    Raises GuardError on every rank where there is none, or where it was gone back to ``max_rollbacks`` times already.
    """
    guard, window, row = progress.guard, skipped_window(progress), job.config.train.guard
    why = f"{guard.in_a_row} steps in a row were skipped, steps {guard.row_after_step + 1} to {progress.step}"
    checkpoint = newest_good(root, guard.row_after_step)
    if checkpoint is None:
        raise _given_up(observer, progress, window, f"{why}, and no checkpoint is from before them")
    restored, _ = load_checkpoint(job, checkpoint)
    windows = (*progress.cursor.skipped_windows, window)
    before = len(restored.cursor.skipped_windows)  # the others were found since this checkpoint
    if len(windows) - before > row.max_rollbacks:
        where = ", ".join(map(str, windows[before:]))
        why = f"{why}, after {row.max_rollbacks} rollbacks to step {restored.step}; sequences {where}"
        raise _given_up(observer, progress, window, why)
    text = f"{why}; back to step {restored.step}, sequences {window} are left out"
    observer.event(Event(progress.step, "rolled back", text, (window.first, window.end)))
    observer.monitor.rewind(restored.step)
    cursor = replace(restored.cursor, skipped_windows=windows)
    return replace(restored, cursor=cursor, wall_seconds=progress.wall_seconds)


def _given_up(observer: Observer, progress: Progress, window: Window, why: str) -> GuardError:
    observer.event(Event(progress.step, "stopped", why, (window.first, window.end)))
    return GuardError(
        f"the guard stops the run at step {progress.step}: {why}. The last steps read sequences {window} of the "
        f"stream; {observer.folder / EVENTS_FILE} has each skipped step, its sequences and its reason. Look at these "
        "data, lower optim.lr, or raise train.guard.loss_factor, norm_factor or max_skips (0: never go back); the "
        "same command goes on from the last checkpoint."
    )
