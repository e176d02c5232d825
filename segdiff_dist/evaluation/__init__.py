"""Real against generated, honestly: metrics, the evaluation job, figures and the report. Imports stay light."""
