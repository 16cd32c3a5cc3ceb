-- The log's tables and views, as ordered migrations: a line `-- migration N` opens each.
-- A migration that was ever released is never edited in what it makes; the next change is a new one at the end.
-- One client applies them while the others wait (infra/clickhouse.py). Every statement can run twice, so one that was
-- cut off half-way is simply run again, by whoever comes next.

-- migration 1

-- One row a record. `record` holds its canonical bytes and is the truth; the engine reads every other column from it.
-- A write is fsynced before it is acknowledged. A batch sent again is dropped by its token within the window, and a row
-- that slips through is collapsed by (run, position): readers use FINAL or LIMIT 1 BY, as merges come when they like.
-- Merged parts are fsynced too, so the many small ones they replace need not be kept for eight minutes: on a busy
-- table even those of ten seconds take several times its own size.
-- After a power cut, parts that were never acknowledged may be torn; the store must set them aside and open all the same.
CREATE TABLE IF NOT EXISTS events
(
    record      String CODEC(ZSTD(3)),
    run         LowCardinality(String)  DEFAULT JSONExtractString(record, 'run'),
    position    UInt64                  DEFAULT JSONExtractUInt(record, 'position'),
    id          UUID                    DEFAULT toUUID(JSONExtractString(record, 'id')),
    type        LowCardinality(String)  DEFAULT JSONExtractString(record, 'type'),
    producer    LowCardinality(String)  DEFAULT JSONExtractString(record, 'producer'),
    cause       Nullable(UUID)          DEFAULT toUUIDOrNull(JSONExtractString(record, 'cause')),
    correlation UUID                    DEFAULT toUUID(JSONExtractString(record, 'correlation')),
    time        DateTime64(6, 'UTC')    DEFAULT parseDateTime64BestEffort(JSONExtractString(record, 'time'), 6, 'UTC'),
    schema      UInt16                  DEFAULT JSONExtractUInt(record, 'schema'),
    version     String                  DEFAULT JSONExtractString(record, 'data', 'version'),
    attempt     String                  DEFAULT JSONExtractString(record, 'data', 'attempt'),
    chain       String                  ALIAS JSONExtractString(record, 'chain'),
    data        String                  ALIAS JSONExtractRaw(record, 'data')
)
ENGINE = ReplacingMergeTree
ORDER BY (run, position)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1, fsync_part_directory = 1,
    min_rows_to_fsync_after_merge = 1, old_parts_lifetime = 1,
    cleanup_delay_period = 1, max_cleanup_delay_period = 2, cleanup_delay_period_random_add = 0,
    max_suspicious_broken_parts = 1000000, max_suspicious_broken_parts_bytes = 1000000000000;

-- One row a model call: `body` is the line as the gateway recorded it (shared/calls.py), `sequence` and `line` say where
-- on the stream it stands, `key` is what an attempt's tries share. Random names do not compress, so no column repeats them.
CREATE TABLE IF NOT EXISTS model_calls
(
    run               LowCardinality(String),
    key               String,
    sequence          UInt64,
    line              UInt32,
    body              String CODEC(ZSTD(3)),
    time              DateTime64(6, 'UTC')   DEFAULT
        toDateTime64OrZero(replaceRegexpOne(JSONExtractString(body, 'time'), '^(.{10})T(.*)Z$', '\\1 \\2'), 6, 'UTC'),
    call              String                 ALIAS JSONExtractString(body, 'call'),
    attempt           String                 DEFAULT JSONExtractString(body, 'attempt'),
    version           String                 DEFAULT JSONExtractString(body, 'version'),
    item              String                 DEFAULT JSONExtractString(body, 'item'),
    role              LowCardinality(String) DEFAULT if(JSONHas(body, 'role'), JSONExtractString(body, 'role'), 'target'),
    kind              LowCardinality(String) DEFAULT JSONExtractString(body, 'kind'),
    model             LowCardinality(String) DEFAULT JSONExtractString(body, 'model'),
    adapter           String                 DEFAULT JSONExtractString(body, 'adapter'),
    digest            String                 ALIAS JSONExtractString(body, 'digest'),
    error             String                 DEFAULT JSONExtractString(body, 'error'),
    prompt_tokens     UInt64                 DEFAULT JSONExtractUInt(body, 'prompt_tokens'),
    completion_tokens UInt64                 DEFAULT JSONExtractUInt(body, 'completion_tokens'),
    usd               Float64                DEFAULT JSONExtractFloat(body, 'usd'),
    seconds           Float64                DEFAULT JSONExtractFloat(body, 'seconds')
)
ENGINE = ReplacingMergeTree
ORDER BY (run, key, sequence, line)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1, fsync_part_directory = 1,
    min_rows_to_fsync_after_merge = 1, old_parts_lifetime = 1,
    cleanup_delay_period = 1, max_cleanup_delay_period = 2, cleanup_delay_period_random_add = 0,
    max_suspicious_broken_parts = 1000000, max_suspicious_broken_parts_bytes = 1000000000000;

-- One row a line of everything else that comes in volume: agent steps, training steps, log lines.
CREATE TABLE IF NOT EXISTS trace
(
    run      LowCardinality(String),
    kind     LowCardinality(String),
    key      String,
    sequence UInt64,
    line     UInt32,
    body     String CODEC(ZSTD(3)),
    time     DateTime64(6, 'UTC') DEFAULT
        toDateTime64OrZero(replaceRegexpOne(JSONExtractString(body, 'time'), '^(.{10})T(.*)Z$', '\\1 \\2'), 6, 'UTC')
)
ENGINE = ReplacingMergeTree
ORDER BY (run, kind, key, sequence, line)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1, fsync_part_directory = 1,
    min_rows_to_fsync_after_merge = 1, old_parts_lifetime = 1,
    cleanup_delay_period = 1, max_cleanup_delay_period = 2, cleanup_delay_period_random_add = 0,
    max_suspicious_broken_parts = 1000000, max_suspicious_broken_parts_bytes = 1000000000000;

-- Every version: where it comes from, which lever made it, what the gate said of it.
CREATE VIEW IF NOT EXISTS lineage AS
SELECT
    made.run AS run,
    JSONExtractUInt(made.data, 'generation') AS generation,
    made.version AS version,
    JSONExtractString(made.data, 'parent') AS parent,
    transform(made.type, ['HarnessPatched', 'WeightsUpdated'], ['harness', 'weights'], 'first') AS lever,
    multiIf(judged.last = 'VersionAccepted', 'accepted', judged.last = 'VersionRejected', 'rejected', 'open') AS verdict,
    JSONExtractString(made.data, 'harness') AS harness,
    JSONExtractString(made.data, 'weights', 'model') AS model,
    JSONExtractString(made.data, 'weights', 'adapter') AS adapter,
    JSONExtract(made.data, 'edits', 'Array(String)') AS edits,
    made.position AS position,
    made.time AS time
FROM (SELECT run, type, version, position, time, data FROM events FINAL
      WHERE type IN ('AgentProposed', 'HarnessPatched', 'WeightsUpdated')) AS made
LEFT JOIN (SELECT run, version, argMax(type, position) AS last FROM events FINAL
           WHERE type IN ('VersionAccepted', 'VersionRejected') GROUP BY run, version) AS judged
    ON judged.run = made.run AND judged.version = made.version;

-- Every score with its interval, by generation and version.
CREATE VIEW IF NOT EXISTS scores AS
SELECT
    scored.run AS run,
    lineage.generation AS generation,
    scored.version AS version,
    lineage.lever AS lever,
    lineage.verdict AS verdict,
    JSONExtractString(scored.data, 'split') AS split,
    JSONExtractFloat(scored.data, 'score', 'value') AS value,
    JSONExtractFloat(scored.data, 'score', 'low') AS low,
    JSONExtractFloat(scored.data, 'score', 'high') AS high,
    JSONExtractUInt(scored.data, 'score', 'n') AS n,
    scored.attempt AS attempt,
    scored.position AS position,
    scored.time AS time
FROM (SELECT run, version, attempt, position, time, data FROM events FINAL WHERE type = 'Scored') AS scored
LEFT JOIN lineage ON lineage.run = scored.run AND lineage.version = scored.version;

-- What each role spent on each model.
CREATE VIEW IF NOT EXISTS costs AS
SELECT
    run, role, model,
    count() AS calls,
    sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens,
    sum(usd) AS usd,
    sum(seconds) AS seconds
FROM model_calls FINAL
GROUP BY run, role, model;

-- Every run at a glance, by its own records: a branch's task is its parent's.
CREATE VIEW IF NOT EXISTS runs AS
SELECT
    run,
    anyIf(JSONExtractString(data, 'task'), type = 'TaskRegistered') AS task,
    anyIf(JSONExtractString(data, 'parent'), type = 'RunBranched') AS parent,
    transform(
        argMaxIf(type, position, type IN ('RunFinished', 'RunCancelled', 'RunPaused', 'RunResumed', 'BudgetExhausted')),
        ['RunFinished', 'RunCancelled', 'RunPaused', 'BudgetExhausted'],
        ['finished', 'cancelled', 'paused', 'stopped by budget'],
        'running') AS status,
    maxIf(JSONExtractUInt(data, 'generation'), type IN ('HarnessPatched', 'WeightsUpdated')) AS generations,
    argMaxIf(version, position, type = 'VersionAccepted') AS best,
    max(position) AS records,
    min(time) AS started,
    max(time) AS updated
FROM events FINAL
GROUP BY run;

-- migration 2

-- A merged part is on disk when it takes the place of others, so those may go as soon as nobody reads them: together
-- with the parts that replaced them they took more room than the rows.
ALTER TABLE events MODIFY SETTING old_parts_lifetime = 0;
ALTER TABLE trace MODIFY SETTING old_parts_lifetime = 0;

-- The table of calls is the big one. A wide part keeps every column in files of its own, 73 of them: below a quarter of
-- a gigabyte that costs more in half-filled blocks than it spares in reading.
ALTER TABLE model_calls MODIFY SETTING old_parts_lifetime = 0, min_bytes_for_wide_part = 268435456;
ALTER TABLE model_calls
    MODIFY COLUMN body CODEC(ZSTD(9)), MODIFY COLUMN item CODEC(ZSTD(3)),
    MODIFY COLUMN prompt_tokens CODEC(ZSTD(3)), MODIFY COLUMN seconds CODEC(ZSTD(3));

-- migration 3

-- A call whose price nobody knows is counted apart: its share of the sum is not nothing, it is missing.
DROP VIEW IF EXISTS costs;
CREATE VIEW IF NOT EXISTS costs AS
SELECT
    run, role, model,
    count() AS calls,
    sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens,
    sum(usd) AS usd,
    countIf(JSONExtractRaw(body, 'usd') = 'null') AS unpriced,
    sum(seconds) AS seconds
FROM model_calls FINAL
GROUP BY run, role, model;

-- migration 4

-- Every version with its last score on each split, NULL where it has none.
CREATE VIEW IF NOT EXISTS versions AS
SELECT
    lineage.run AS run,
    lineage.generation AS generation,
    lineage.version AS version,
    lineage.parent AS parent,
    lineage.lever AS lever,
    lineage.verdict AS verdict,
    judged.dev AS dev,
    judged.gate AS gate,
    judged.test AS test,
    lineage.harness AS harness,
    lineage.model AS model,
    lineage.adapter AS adapter,
    lineage.position AS position,
    lineage.time AS time
FROM lineage
LEFT JOIN (SELECT run, version,
               argMaxOrNullIf(value, position, split = 'dev') AS dev,
               argMaxOrNullIf(value, position, split = 'gate') AS gate,
               argMaxOrNullIf(value, position, split = 'test') AS test
           FROM scores GROUP BY run, version) AS judged
    ON judged.run = lineage.run AND judged.version = lineage.version;

-- Every record that a service gave up on; `payload` is the digest of the blob that keeps it.
CREATE VIEW IF NOT EXISTS dead_letters AS
SELECT
    run,
    JSONExtractString(data, 'service') AS service,
    JSONExtractString(data, 'failed') AS failed,
    JSONExtractUInt(data, 'sequence') AS sequence,
    JSONExtractUInt(data, 'tries') AS tries,
    JSONExtractString(data, 'error') AS error,
    JSONExtractString(data, 'payload') AS payload,
    position,
    time
FROM events FINAL
WHERE type = 'ServiceFailed';

-- migration 5

-- A merge packs the whole of what it merges once more, at a high level: calls come in many small batches, and by the
-- engine's own measure, which counts every part for five megabytes more, it packed a table of one megabyte 200 times.
ALTER TABLE model_calls MODIFY SETTING merge_selector_base = 20;

-- migration 6

-- What the programs of attempts said, line by line; `omitted` is how many lines before it were not kept.
CREATE VIEW IF NOT EXISTS logs AS
SELECT
    run,
    key AS attempt,
    JSONExtractString(body, 'stream') AS stream,
    JSONExtractString(body, 'text') AS text,
    JSONExtractUInt(body, 'omitted_lines') AS omitted,
    sequence,
    line
FROM (SELECT * FROM trace FINAL WHERE kind = 'log')
ORDER BY sequence, line;

-- When a row came, for those who let traces go after some days. Rows of before count from here on.
ALTER TABLE model_calls ADD COLUMN IF NOT EXISTS stored DateTime('UTC') DEFAULT now();
ALTER TABLE trace ADD COLUMN IF NOT EXISTS stored DateTime('UTC') DEFAULT now();

-- migration 7

-- A run that was given more budget goes on, and one that is paused does not, whatever became of its budget.
CREATE OR REPLACE VIEW runs AS
SELECT
    run,
    anyIf(JSONExtractString(data, 'task'), type = 'TaskRegistered') AS task,
    anyIf(JSONExtractString(data, 'parent'), type = 'RunBranched') AS parent,
    multiIf(
        countIf(type = 'RunFinished') > 0, 'finished',
        countIf(type = 'RunCancelled') > 0, 'cancelled',
        argMaxIf(type, position, type IN ('RunPaused', 'RunResumed')) = 'RunPaused', 'paused',
        argMaxIf(type, position, type IN ('BudgetExhausted', 'BudgetChanged')) = 'BudgetExhausted', 'stopped by budget',
        'running') AS status,
    maxIf(JSONExtractUInt(data, 'generation'), type IN ('HarnessPatched', 'WeightsUpdated')) AS generations,
    argMaxIf(version, position, type = 'VersionAccepted') AS best,
    max(position) AS records,
    min(time) AS started,
    max(time) AS updated
FROM events FINAL
GROUP BY run;

-- migration 8

-- Whose records a run's history has, each up to a position: its own, its parent's, its parent's parent's.
CREATE VIEW IF NOT EXISTS ancestors AS
WITH RECURSIVE
    forks AS (SELECT run, JSONExtractString(data, 'parent') AS parent, JSONExtractUInt(data, 'at') AS at
              FROM events FINAL WHERE type = 'RunBranched'),
    up AS (SELECT DISTINCT run, run AS ancestor, toUInt64(0) AS steps, 18446744073709551615 AS until FROM events
           UNION ALL
           SELECT up.run, forks.parent, up.steps + 1, least(up.until, forks.at)
           FROM up JOIN forks ON forks.run = up.ancestor
           WHERE up.steps < 500)  -- what was forged may descend from itself
SELECT run, ancestor, steps, until FROM up;

-- A branch scores versions of its parents too: what they are is told where they were made, and the verdict anywhere.
CREATE OR REPLACE VIEW scores AS
SELECT
    scored.run AS run,
    made.generation AS generation,
    scored.version AS version,
    made.lever AS lever,
    multiIf(judged.last = 'VersionAccepted', 'accepted', judged.last = 'VersionRejected', 'rejected', 'open') AS verdict,
    JSONExtractString(scored.data, 'split') AS split,
    JSONExtractFloat(scored.data, 'score', 'value') AS value,
    JSONExtractFloat(scored.data, 'score', 'low') AS low,
    JSONExtractFloat(scored.data, 'score', 'high') AS high,
    JSONExtractUInt(scored.data, 'score', 'n') AS n,
    scored.attempt AS attempt,
    scored.position AS position,
    scored.time AS time
FROM (SELECT run, version, attempt, position, time, data FROM events FINAL WHERE type = 'Scored') AS scored
LEFT JOIN (SELECT ancestors.run AS run, lineage.version AS version, any(lineage.generation) AS generation,
               any(lineage.lever) AS lever
           FROM ancestors JOIN lineage ON lineage.run = ancestors.ancestor
           WHERE lineage.position <= ancestors.until GROUP BY run, version) AS made
    ON made.run = scored.run AND made.version = scored.version
LEFT JOIN (SELECT ancestors.run AS run, verdicts.version AS version, argMax(verdicts.type, verdicts.position) AS last
           FROM ancestors
           JOIN (SELECT run, type, version, position FROM events FINAL
                 WHERE type IN ('VersionAccepted', 'VersionRejected')) AS verdicts ON verdicts.run = ancestors.ancestor
           WHERE verdicts.position <= ancestors.until GROUP BY run, version) AS judged
    ON judged.run = scored.run AND judged.version = scored.version;

-- A branch has its parent's task, and goes on from what that came to.
CREATE OR REPLACE VIEW runs AS
SELECT
    own.run AS run,
    if(own.task = '', before.task, own.task) AS task,
    own.parent AS parent,
    own.status AS status,
    greatest(own.generations, before.generations) AS generations,
    if(own.best = '', before.best, own.best) AS best,
    own.records AS records,
    own.started AS started,
    own.updated AS updated
FROM (SELECT
          run,
          anyIf(JSONExtractString(data, 'task'), type = 'TaskRegistered') AS task,
          anyIf(JSONExtractString(data, 'parent'), type = 'RunBranched') AS parent,
          multiIf(
              countIf(type = 'RunFinished') > 0, 'finished',
              countIf(type = 'RunCancelled') > 0, 'cancelled',
              argMaxIf(type, position, type IN ('RunPaused', 'RunResumed')) = 'RunPaused', 'paused',
              argMaxIf(type, position, type IN ('BudgetExhausted', 'BudgetChanged')) = 'BudgetExhausted',
              'stopped by budget',
              'running') AS status,
          maxIf(JSONExtractUInt(data, 'generation'), type IN ('HarnessPatched', 'WeightsUpdated')) AS generations,
          argMaxIf(version, position, type = 'VersionAccepted') AS best,
          max(position) AS records,
          min(time) AS started,
          max(time) AS updated
      FROM events FINAL
      GROUP BY run) AS own
LEFT JOIN (SELECT
               ancestors.run AS run,
               anyIf(JSONExtractString(told.data, 'task'), told.type = 'TaskRegistered') AS task,
               maxIf(JSONExtractUInt(told.data, 'generation'), told.type IN ('HarnessPatched', 'WeightsUpdated'))
                   AS generations,
               argMaxIf(told.version, told.position, told.type = 'VersionAccepted') AS best
           FROM ancestors
           JOIN (SELECT run, type, version, position, data FROM events FINAL
                 WHERE type IN ('TaskRegistered', 'HarnessPatched', 'WeightsUpdated', 'VersionAccepted')) AS told
               ON told.run = ancestors.ancestor
           WHERE ancestors.steps > 0 AND told.position <= ancestors.until
           GROUP BY run) AS before
    ON before.run = own.run;
