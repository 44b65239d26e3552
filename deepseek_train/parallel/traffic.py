"""Bytes that really left a rank for its experts, counted where they leave."""

from dataclasses import dataclass, field, replace
from threading import Lock

from deepseek_train.spec.links import ExpertTraffic, LinkBytes, Purpose


@dataclass
class Traffic:
    """Counts. Hops that follow others are started by the network's threads, hence the lock."""

    _sent: ExpertTraffic = ExpertTraffic()
    _lock: Lock = field(default_factory=Lock)

    def add(self, purpose: Purpose, sent: LinkBytes) -> None:
        with self._lock:
            before = self._sent
            match purpose:
                case Purpose.PLAN:
                    self._sent = replace(before, plan=before.plan + sent)
                case Purpose.DISPATCH:
                    self._sent = replace(before, dispatch=before.dispatch + sent)
                case Purpose.COMBINE:
                    self._sent = replace(before, combine=before.combine + sent)

    def add_least_cross(self, num_bytes: int) -> None:
        with self._lock:
            self._sent = replace(self._sent, least_cross=self._sent.least_cross + num_bytes)

    def take(self) -> ExpertTraffic:
        """What has been sent since it was last taken. Nothing is under way."""
        with self._lock:
            sent, self._sent = self._sent, ExpertTraffic()
        return sent
