"""`moeserve ctl`: looks at a running server and changes it, over its ZeroMQ front."""
