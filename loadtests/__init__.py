"""Load tests of a served model: Locust's shapes of load, and the generator of ``slipstream bench``."""
