"""Which kv blocks hold which token prefixes: a trie whose edges are the tokens of one full block.

A node stands for the *whole* prefix from the first token to the end of its block, because reaching
it means having matched every block before it. Matching compares token tuples, never bare hashes, so
two different prefixes cannot be taken for one another. The same idea as vLLM's automatic prefix
caching (hash chain per block; Kwon et al., SOSP 2023, section 4.4 describes the sharing) and
SGLang's RadixAttention (Zheng et al., NeurIPS 2024, section 3), with edges of one block each.

The index knows neither reference counts nor recency; `kv_blocks.BlockManager` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class PrefixNode:
    """One indexed block. Compared by identity: a node that was removed never comes back to life."""

    __slots__ = ("alive", "block_id", "children", "parent", "tokens")

    def __init__(self, parent: PrefixNode | None, tokens: tuple[int, ...], block_id: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.block_id = block_id
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        self.alive = True


class PrefixIndex:
    """The trie. Blocks are `block_tokens` long; a block id occurs at most once.

    There is a root for each variant of kv: the same tokens under different roots have nothing in
    common (LongRoPE's short and long sequences).
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._roots: dict[int, PrefixNode] = {}
        self._num_nodes = 0

    def __len__(self) -> int:
        return self._num_nodes

    def root(self, variant: int) -> PrefixNode:
        """Where the prefixes of a variant start."""
        root = self._roots.get(variant)
        if root is None:
            root = self._roots[variant] = PrefixNode(None, (), -1)
        return root

    def match(
        self, token_ids: Sequence[int], max_blocks: int, path: list[PrefixNode], variant: int = 0
    ) -> None:
        """Brings `path` up to date: the nodes of the longest indexed prefix of `token_ids`.

        `path` is what an earlier call for the same tokens found (or empty). Only nodes lost since
        are dropped and only new ones looked up, so asking again on every step while a request
        waits costs one failed look-up, not one per block. At most `max_blocks` nodes.
        """
        # Removal is leaf first, so a living node has living ancestors: looking at the end suffices.
        while path and (len(path) > max_blocks or not path[-1].alive):
            path.pop()
        size = self._block_tokens
        node = path[-1] if path else self.root(variant)
        for start in range(len(path) * size, max_blocks * size, size):
            child = node.children.get(tuple(token_ids[start : start + size]))
            if child is None:
                return
            path.append(child)
            node = child

    def insert(self, parent: PrefixNode, tokens: tuple[int, ...], block_id: int) -> PrefixNode:
        """The node for `tokens` after `parent`, perhaps a root; made with `block_id` if new.

        A node that exists keeps its own block id: the caller sees a different one and knows that
        its block is a duplicate.
        """
        assert parent.alive
        assert len(tokens) == self._block_tokens
        node = parent.children.get(tokens)
        if node is None:
            node = PrefixNode(parent, tokens, block_id)
            parent.children[tokens] = node
            self._num_nodes += 1
        return node

    def remove(self, node: PrefixNode) -> None:
        """Forgets a leaf."""
        assert node.alive
        assert not node.children
        assert node.parent is not None
        del node.parent.children[node.tokens]
        node.alive = False
        self._num_nodes -= 1

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes, parents before children."""
        stack = [node for root in self._roots.values() for node in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_integrity(self) -> None:
        """Asserts that links agree in both directions and that no block id occurs twice."""
        seen: set[int] = set()
        for node in self.nodes():
            assert node.alive
            assert node.parent is not None
            assert node.parent.children[node.tokens] is node
            assert len(node.tokens) == self._block_tokens
            assert node.block_id not in seen, f"block {node.block_id} is indexed twice"
            seen.add(node.block_id)
        assert len(seen) == self._num_nodes
