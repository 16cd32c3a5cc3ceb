"""What a monitoring system makes of our metrics, by the parser of its own client."""

from prometheus_client.openmetrics.parser import text_string_to_metric_families


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by metric and by its label, "" where it has none."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
