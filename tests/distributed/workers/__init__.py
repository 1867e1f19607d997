"""Workers with a replica each that share one capture or replay: launchers, late workers, killed workers."""
