"""How many sends a rank may have under way on each of its links: boundary buffers that do not grow with the number
of micro-batches.
"""

from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.lower import Link, lower, sends_in_flight
from deepseek_train.schedule.replay import replay


def send_windows(schedule: Schedule, *, prefetch: int = 1) -> dict[Link, int]:
    """For each link the sends to keep under way before waiting for the oldest: ``sends_in_flight``, but no more than
    there are stages. ``schedule`` has passed ``check``.

    The limit matters where nothing comes back to hold a sender: in evaluation and in GPipe. There a sender may now
    have to wait for a later step of its peer, so the programs are replayed with these windows; should they get stuck
    (a schedule written by hand), the windows are those of ``sends_in_flight``, which never block.
    """
    never_blocking = sends_in_flight(schedule, prefetch=prefetch)
    limited = {link: min(count, schedule.placement.num_stages) for link, count in never_blocking.items()}
    if limited == never_blocking:
        return never_blocking
    stuck = replay(schedule.placement, lower(schedule, prefetch=prefetch), limited)
    return never_blocking if stuck else limited
