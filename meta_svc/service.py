"""The table of meta_svc."""

from sia_events.meta_svc.perform import propose
from sia_events.shared.events import RunStarted
from sia_events.shared.service import Service

meta_svc = Service("meta_svc", performs={RunStarted: propose})
