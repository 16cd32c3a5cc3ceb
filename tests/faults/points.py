"""The fail points: what stands between two steps of a run, each by the name under which `reach` knows it.

A name with {} has the service, the type of the record that it answers, the stream or the step in its place.
"""

OF_A_RUN = (
    "sia run before opening",
    "sia run after opening",
    "{} before answering {}",
    "{} before publishing on {}",
    "{} after publishing on {}",
    "target_runner after running an agent",
    "model_gateway before asking a model",
    "model_gateway before recording a call",
    "model_gateway after recording a call",
    "recorder before inserting from {}",
    "recorder before acking {}",
    "recorder after acking {}",
    "sia run before the log has everything",
    "sia run after its last word",
)
OF_AN_AUTHOR_WITH_TOOLS = ("agents before recording a command", "agents after recording a command")
OF_A_BRANCH = ("sia branch before opening", "sia branch after opening")
OF_A_REBUILD = ("recorder before clearing the log", "recorder after clearing the log")
OF_A_REPAIR = (
    "sia verify before mending",
    "sia verify after mending the tables",
    "sia verify after putting back records",
    "sia verify after putting back traces",
    "sia verify after mending the streams",
    "sia verify after mending the blobs",
)
OF_A_RESTORE = (
    "sia restore before writing",
    "sia restore after sending an envelope",
    "sia restore after storing a blob",
    "sia restore after putting back a run",
)
OF_A_SWEEP = ("sia gc before removing a blob", "sia gc after removing a blob")
OF_A_DROP = ("sia dlq before dropping", "sia dlq after dropping")
# Killed in the tests of learning.
OF_A_LEARNER = ("learner before keeping step {}", "learner behind keeping step {}")
POINTS = (
    *OF_A_RUN,
    *OF_AN_AUTHOR_WITH_TOOLS,
    *OF_A_BRANCH,
    *OF_A_REBUILD,
    *OF_A_REPAIR,
    *OF_A_RESTORE,
    *OF_A_SWEEP,
    *OF_A_DROP,
    *OF_A_LEARNER,
)
