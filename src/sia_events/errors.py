"""Which failures a person can mend; their messages say what, where, what was kept and what to do."""

from filelock import Timeout

from sia_events.infra.archive import ArchiveUnusable
from sia_events.infra.blobs import BlobsUnavailable
from sia_events.infra.child import ChildFailed
from sia_events.infra.clickhouse import LogFull, LogUnavailable, QueryRefused, StoreTooNew, StoreUnsafe
from sia_events.infra.nats_server import NatsServerFailed
from sia_events.infra.nats_streams import StreamUnfit
from sia_events.infra.store_lock import StoreHeld
from sia_events.infra.tail import RunIncomplete, RunTooNew
from sia_events.local_model.weights import ModelNotReady
from sia_events.same_streams import OtherStreams
from sia_events.shared.items import TaskError
from sia_events.shared.ports import (
    BlobCorrupt,
    BlobMissing,
    BusFull,
    BusUnreachable,
    NoSuchPosition,
    RunExists,
    SandboxUnavailable,
)
from sia_events.shared.record import NewerRecord
from sia_events.shared.settings import SettingsError


class Unusable(Exception):
    """What was asked for cannot be done as asked; nothing was written."""


class NodeHeld(Exception):
    """Another process runs the services of this home; nothing was written."""


MENDABLE: tuple[type[Exception], ...] = (
    Unusable,
    NodeHeld,
    SettingsError,
    TaskError,
    ModelNotReady,
    SandboxUnavailable,
    NatsServerFailed,
    BusFull,
    BusUnreachable,
    StreamUnfit,
    RunExists,
    NoSuchPosition,
    RunIncomplete,
    RunTooNew,
    NewerRecord,
    StoreHeld,
    StoreTooNew,
    StoreUnsafe,
    LogFull,
    LogUnavailable,
    QueryRefused,
    OtherStreams,
    BlobsUnavailable,
    BlobMissing,
    BlobCorrupt,
    ChildFailed,
    ArchiveUnusable,
    Timeout,
)
