"""What a run tells of itself while it runs: numbers, pictures, where its time goes."""
