"""LeRobot datasets, format v2.0, v2.1 and v3.0: metadata, parquet tables and the store over them."""

from vlafit.datasets.lerobot.meta import Entry, Meta, read_meta
from vlafit.datasets.lerobot.store import LeRobotStore

__all__ = ["Entry", "LeRobotStore", "Meta", "read_meta"]
