"""The peers benchmark: the same random weights in moeserve, llama.cpp and transformers."""
