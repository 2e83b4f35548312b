"""`moeserve doctor`: what this machine has, what moeserve makes of it, and what is in the way."""
