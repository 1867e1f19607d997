"""What a job is told and what it runs on: settings and loaded models. Uses `data`."""
