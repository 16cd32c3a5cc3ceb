"""One record found on the stream by its position in a run, without reading the run up to it."""

from nats.aio.client import Client

from sia_events.infra.delivery import checked_name
from sia_events.infra.nats_partitions import EVENTS, Partitions
from sia_events.infra.nats_streams import last_message, read, read_on
from sia_events.infra.nats_wire import read_record
from sia_events.shared.events import RunBranched
from sia_events.shared.record import Record, UnreadableRecord, broken_link

NEAR = 32  # so many records are read at once rather than halved again


async def seek(client: Client, partitions: Partitions, run: str, position: int) -> Record | None:
    """The record at `position` of the run's lineage, or None where only who reads the run can tell.

    A search of the stream by how many of the run's messages lie behind a sequence: its questions grow with the
    logarithm of the stream's length at most. Where each of the run's messages is its next record, as every append
    leaves it, the count says which one it is. What was found is compared with what the count says, so a message that
    is lost, doubled or foreign is noticed here, and reading puts up with it.
    """
    known: set[str] = set()
    while run not in known:
        known.add(checked_name(run))
        stream, subject = partitions.of(EVENTS, run), f"sia.events.{run}.>"
        head, behind = await read_on(client, stream, 1, subject, 1)
        tail = await last_message(client, stream, subject)
        if not head or not tail:
            return None
        try:
            first, last = read_record(head[0], partitions), read_record(tail, partitions)
            if isinstance(first.event, RunBranched) and position <= first.event.at:
                run = first.event.parent
                continue
            if not first.position <= position <= last.position == first.position + behind:
                return None
            start = head[0].sequence, first.position
            low, at = await _near(client, stream, subject, position, start, tail.sequence, behind)
            messages = await read(client, stream, low, subject, position - at + 1)
            found = [read_record(each, partitions) for each in messages]
        except UnreadableRecord:
            return None
        positions = [record.position for record in found]
        in_line = positions == list(range(at, position + 1)) and not broken_link(found[1:], found[0].chain)
        return found[-1] if in_line else None
    return None


async def _near(
    client: Client, stream: str, subject: str, position: int, first: tuple[int, int], high: int, behind: int
) -> tuple[int, int]:
    """Sequence and position of a message of the subject up to NEAR before `position`; the first is before itself.

    `first` is such a pair, with `behind` messages behind it, the last of which has the sequence `high`.
    """
    (low, at), last = first, first[1] + behind
    end, halve = last, False
    # With nothing left between the two the count was wrong, of messages that nobody can read: what is read will tell.
    while position - at > NEAR and low < high:
        # Where a run stands alone or spreads evenly the first guess is good; halving bounds the rest.
        ahead = (high - low) // 2 if halve else (high - low) * (position - NEAR // 2 - at) // (end - at)
        middle, halve = low + max(1, ahead), not halve
        found, behind = await read_on(client, stream, middle, subject, 1)
        there = last - behind if found else last
        if there < position:
            low, at = found[0].sequence, there
        else:
            high, end = middle - 1, there
    return low, at
