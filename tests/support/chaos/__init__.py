"""A deployment, and a monkey that breaks it."""
