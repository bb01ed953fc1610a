"""What a run is: its folder, its events, its base, its adapter."""
