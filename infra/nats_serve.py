"""One durable consumer served through FastStream: some messages at once, heartbeats, bounded delayed retries."""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

import structlog
from faststream.middlewares import AckPolicy
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub
from faststream.nats.subscriber.usecases import PullStreamSubscriber
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api
from nats.js.errors import APIError, NotFoundError

from sia_events.infra.delivery import delay, is_last, is_outage
from sia_events.infra.nats_streams import ANSWER_S, UNANSWERED, Message, heeding

CANCELLED_DELAY_S = 0.1
# Tries are counted where they fail. This counts deliveries, so it also ends a message that kills whoever takes it.
MAX_DELIVERIES = 25
CONSUMER_GONE_S = 3600.0
MAX_OUT = 256  # of a consumer, over all processes that share it; how many a process takes is its own choice
WATCH_S = 5.0
PULL_S = 2.0

log = structlog.get_logger()


class Unanswerable(Exception):
    """What was delivered can never be answered: it goes to the dead letters at once. The cause says why."""


@dataclass
class Serving:
    """What to do with a stream's messages that a consumer hands out, and what is being done.

    `answer` handles one message; when it fails for the last time `give_up` records that, before the message is ended.
    """

    stream: str
    consumer: api.ConsumerConfig
    answer: Callable[[Message], Awaitable[None]]
    give_up: Callable[[Message, Exception, int], Awaitable[None]]
    retry_delay: float
    at_once: int = 1
    failures: Counter[int] = field(default_factory=Counter)
    outages: Counter[int] = field(default_factory=Counter)
    """How often a message waited for a disk or a store: its next wait goes by it, and no try."""
    running: set[asyncio.Task[None]] = field(default_factory=set)
    answered: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=MAX_OUT))
    """Of the last messages: their sequence, and where their ack was sent."""
    made: datetime | None = None
    """When the consumer was that handed them out."""
    stopping: bool = False

    def handed_out_by(self, made: datetime) -> None:
        """Forget what was answered to another consumer: one made anew hands all of it out anew, to any process."""
        if made != self.made:
            self.answered.clear()
            self.made = made


def consumer(name: str, subjects: list[str], ack_wait: float, in_order: bool) -> api.ConsumerConfig:
    """With `in_order` one message is out at a time, so a message that waits for its next try is not overtaken.

    The server is told to try for ever: the tries are bounded here, where the dead letter can be written first.
    """
    return api.ConsumerConfig(
        name=name,
        durable_name=name,
        filter_subjects=subjects,
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=ack_wait,
        max_ack_pending=1 if in_order else MAX_OUT,
        max_deliver=-1,
        inactive_threshold=CONSUMER_GONE_S,
    )


async def serve(broker: NatsBroker, client: Client, serving: Serving, keep: bool) -> None:
    """Serve until cancelled; a consumer that is lost is made anew. Without `keep` it is deleted in the end.

    Each subscriber takes one message, works on it and only then asks for the next: a message that waits in a queue of
    ours would be taken for lost. So there are as many subscribers as messages may be worked on at once.
    """
    jetstream, name = client.jetstream(), serving.consumer.durable_name
    assert name

    async def handle(message: NatsMessage) -> None:
        await _handle(message.raw_message, serving)

    async def until_gone() -> None:
        made = await heeding(jetstream.add_consumer(serving.stream, serving.consumer))
        serving.handed_out_by(made.created)
        subscribers = [_subscriber(broker, serving, handle) for _ in range(serving.at_once)]
        try:
            for subscriber in subscribers:
                await heeding(subscriber.start())
            await _gone(client, serving, name)
        finally:
            serving.stopping = True
            for task in serving.running:
                task.cancel()
            for subscriber in subscribers:
                await subscriber.stop()
            serving.stopping = False

    try:
        while True:
            with suppress(*UNANSWERED):
                await heeding(until_gone())
            await asyncio.sleep(0.2)
    finally:
        if not keep:
            with suppress(APIError, *UNANSWERED):
                await jetstream.delete_consumer(serving.stream, name)


def _subscriber(
    broker: NatsBroker, serving: Serving, handle: Callable[[NatsMessage], Awaitable[None]]
) -> PullStreamSubscriber:
    config = serving.consumer
    subscriber = broker.subscriber(
        durable=config.durable_name,
        # declare=False: FastStream would rewrite the stream to its own idea of a configuration.
        stream=JStream(serving.stream, declare=False),
        config=config,
        pull_sub=PullSub(batch_size=1, timeout=PULL_S),
        ack_policy=AckPolicy.MANUAL,
        decoder=_whole,
        no_reply=True,
        persistent=False,
    )
    subscriber(handle)
    return subscriber


async def _whole(message: NatsMessage) -> NatsMessage:
    """FastStream's decoder: the message as it came. Reading it is our handler's business, which knows about poison."""
    return message


async def _handle(raw: Msg, serving: Serving) -> None:
    place = raw.metadata
    message = Message(place.sequence.stream, raw.subject, raw.data)
    try:
        await _beating(raw, serving, message)
    except asyncio.CancelledError:
        await _settle(lambda: raw.nak(CANCELLED_DELAY_S))
    except Exception as error:
        if is_outage(error):
            serving.outages[message.sequence] += 1
            waited = serving.outages[message.sequence]
            log.warning("a record waits: a disk is full, or the blobs are away", subject=raw.subject, error=str(error))
            await _settle(lambda: raw.nak(delay(waited, serving.retry_delay)))
            return
        serving.failures[message.sequence] += 1
        tries = serving.failures[message.sequence]
        delivered = place.num_delivered - serving.outages[message.sequence]
        hopeless = isinstance(error, Unanswerable) or is_last(error, tries) or delivered >= MAX_DELIVERIES
        log.warning("failed on a record", subject=raw.subject, tries=tries, error=repr(error))
        if not hopeless:
            await _settle(lambda: raw.nak(delay(tries, serving.retry_delay)))
            return
        try:
            await serving.give_up(message, error, tries)
        except Exception as lost:
            # Without its letter the message stays: ended first, it would be gone from sight.
            log.error("cannot write a dead letter", subject=raw.subject, error=repr(lost))
            await _settle(lambda: raw.nak(delay(tries, serving.retry_delay)))
        else:
            # Offered once more on request, it has all its tries again.
            del serving.failures[message.sequence]
            serving.outages.pop(message.sequence, None)
            await _settle(raw.term)
    else:
        serving.failures.pop(message.sequence, None)
        serving.outages.pop(message.sequence, None)
        # Confirmed: an ack lost with a dying server would hold up the run until the ack wait is over.
        await _settle(lambda: raw.ack_sync(ANSWER_S))
        serving.answered.append((message.sequence, raw.reply))


async def _beating(raw: Msg, serving: Serving, message: Message) -> None:
    """Run the answer, and say at thirds of the ack wait that it is still being worked on."""
    task = asyncio.ensure_future(serving.answer(message))
    serving.running.add(task)
    try:
        while not (await asyncio.wait({task}, timeout=(serving.consumer.ack_wait or 30.0) / 3))[0]:
            with suppress(*UNANSWERED):
                await raw.in_progress()
    finally:
        serving.running.discard(task)
        task.cancel()
    if task.cancelled() and not serving.stopping:
        raise RuntimeError("the answer cancelled itself")
    task.result()


async def _settle(tell: Callable[[], Awaitable[object]]) -> None:
    """Tell the server what came of a message. Untold, it comes again after the ack wait, and the answer is there.

    A second time, behind a connection that was lost. No more: a server that was killed may have forgotten that it
    handed the message out, and does not confirm its ack then, however often it is told.
    """
    for _ in range(2):
        try:
            await tell()
            return
        except UNANSWERED:
            await asyncio.sleep(0.2)
    log.debug("could not tell the server what came of a message")


async def _gone(client: Client, serving: Serving, name: str) -> None:
    """Return when the consumer is no longer there. FastStream would go on asking for its messages, fast and silent.

    A server that is killed forgets the acks that it confirmed last, and would wait for them until the ack wait is over
    before it hands out what is next: they are said again.
    """
    jetstream = client.jetstream()
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            known = await heeding(jetstream.consumer_info(serving.stream, name))
            serving.handed_out_by(known.created)
            if known.num_ack_pending and not serving.running:
                acked = known.ack_floor.stream_seq if known.ack_floor else 0
                for reply in [reply for sequence, reply in serving.answered if sequence > acked]:
                    await client.publish(reply, Msg.Ack.Ack)
        except NotFoundError:
            return
        except (APIError, *UNANSWERED):
            continue  # not known to be gone
