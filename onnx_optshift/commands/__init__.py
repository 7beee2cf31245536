"""What users run: shift, inspect, verify and diagnose, each with its own words for how it went."""
