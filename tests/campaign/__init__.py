"""The campaign: thousands of damaged inputs and random kills, and how the software takes them (docs/reliability.md)."""
