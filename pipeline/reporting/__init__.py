"""The report: what every strategy keeps, what it costs and what it gains, as one HTML file, CSV and JSON."""
