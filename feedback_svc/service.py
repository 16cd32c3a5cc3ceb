"""The table of feedback_svc."""

from sia_events.feedback_svc.decide import (
    on_approval,
    on_barren,
    on_failure,
    on_feedback,
    on_refusal,
    on_score,
    on_verdict,
)
from sia_events.feedback_svc.perform import give_feedback, patch
from sia_events.shared.events import (
    ApprovalGiven,
    ApprovalRefused,
    AttemptFailed,
    FeedbackGiven,
    FeedbackRequested,
    HarnessPatchRequested,
    ProposalFailed,
    Scored,
    VersionAccepted,
    VersionRejected,
)
from sia_events.shared.oversight import overseen
from sia_events.shared.service import Service

feedback_svc = Service(
    "feedback_svc",
    decides=overseen(
        {
            Scored: on_score,
            AttemptFailed: on_failure,
            VersionAccepted: on_verdict,
            VersionRejected: on_verdict,
            ProposalFailed: on_barren,
            FeedbackGiven: on_feedback,
            ApprovalGiven: on_approval,
            ApprovalRefused: on_refusal,
        }
    ),
    performs={FeedbackRequested: give_feedback, HarnessPatchRequested: patch},
)
