"""The backward pass: the order of its kernels."""

from typing import NamedTuple

import torch

from keras_rwr.backends.torch import band_gradient_kernels, list_kernels, row_kernels
from keras_rwr.backends.torch.launch import PLAIN_ROWS, Walk, head_stride, strides
from keras_rwr.backends.torch.pieces import divide
from keras_rwr.backends.torch.plan import Plan, ceil_div
from keras_rwr.backends.torch.run import run

# Tokens of a piece, counted once a head. On an H200, pieces of 2**18 take 2 to 7 % more time than
# all at once, pieces of 2**16 take 40 %.
PIECE = 2**19


class Gradients(NamedTuple):
    """What the backward pass makes."""

    query: torch.Tensor  # (B, S, N, H)
    key: torch.Tensor  # (B, S, N, H)
    value: torch.Tensor  # (B, S, N, V)
    bias: torch.Tensor | None  # (B, N, S) float32
    radial: torch.Tensor  # (B, N, S), sums of `dc_ij c_ij` over rows
    lens: torch.Tensor  # (B, N, S), the parts of the lens strength's gradient

    def piece(self, piece):
        tokens, heads = piece.of_tokens, piece.of_heads
        return Gradients(
            query=tokens(self.query),
            key=tokens(self.key),
            value=tokens(self.value),
            bias=heads(self.bias),
            radial=heads(self.radial),
            lens=heads(self.lens),
        )


def backward(inputs, options, saved, cotangent):
    """The backward pass.

    Args:
        inputs: `Inputs`.
        options: `Options`.
        saved: `Saved`, what `forward` kept.
        cotangent: Tensor of shape `(B, S, N, V)`, the output's gradient.

    Returns:
        Gradients of query, key, value, bias, concentration and lens strength.
    """
    whole = Plan(inputs, options)
    gradients = Gradients(
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3]),
        bias=None if inputs.bias is None else torch.zeros_like(inputs.bias),
        radial=whole.numbers(),
        lens=whole.numbers(),
    )
    for piece in divide(whole, PIECE):
        walk = Backward(piece.inputs(inputs), options, piece.first_head)
        part = piece.saved(saved, whole.blocks)
        walk.launch(part, piece.of_tokens(cotangent), gradients.piece(piece))
    concentration = torch.zeros_like(inputs.concentration)
    if options.exponential:
        concentration = gradients.radial.sum((0, 2)) / inputs.concentration
    return (*gradients[:4], concentration, gradients.lens.sum((0, 2)))


class Backward(Walk):
    """A call's plan, and the launches of its backward pass."""

    def launch(self, saved, cotangent, gradients):
        """Fills `gradients`."""
        inputs, options = self.inputs, self.options
        adjoint = self.empty(self.batch, self.heads, options.steps + 1, self.size, self.walked)
        adjoints = [x.transpose(1, 2) for x in adjoint.unbind(2)]
        local_delta, delta = self.numbers(), self.numbers()
        last, start = self.state(saved, options.steps), self.state(saved, 0)
        run(
            row_kernels.start_adjoint,
            self.grid(PLAIN_ROWS),
            cotangent,
            saved.output,
            last,
            saved.scales[0],
            inputs.lens_strength,
            adjoints[-1],
            local_delta,
            gradients.lens,
            *strides(cotangent),
            *strides(saved.output),
            *strides(last),
            head_stride(adjoints[-1]),
            self.size,
            self.heads,
            self.batch_heads,
            *options.shares,
            ROWS=PLAIN_ROWS,
            WALKED=self.walked,
            RECIPROCAL=options.reciprocal,
            **self.values_of,
        )
        for step in range(options.steps, 0, -1):
            self.step(saved, adjoints[step], adjoints[step - 1], transposed=True)
        run(
            row_kernels.finish_adjoint,
            self.grid(PLAIN_ROWS),
            adjoint,
            saved.states,
            start,
            saved.scales[0],
            gradients.value,
            delta,
            gradients.bias,
            *strides(start),
            *strides(gradients.value),
            self.size,
            self.heads,
            self.batch_heads,
            ROWS=PLAIN_ROWS,
            WALKED=self.walked,
            STEPS=options.steps,
            RECIPROCAL=options.reciprocal,
            **self.values_of,
        )
        far = {}
        if inputs.neighbors is not None:
            far = self.far_edge_gradients(saved, adjoint, start, delta)
        self.edge_gradients(saved, cotangent, adjoint, start, local_delta, delta, far, gradients)

    def far_edge_gradients(self, saved, adjoint, start, delta):
        inputs, options = self.inputs, self.options
        entries = inputs.neighbors.shape
        has_bias = inputs.bias is not None
        far = {
            "entry_gradient": self.empty(*entries, self.head_size),
            "entry_radial": self.empty(*entries, dtype=torch.float32),
            "entry_bias": (
                self.empty(*entries, dtype=torch.float32) if has_bias and options.mutual else None
            ),
            "key_gradient": self.empty(self.batch, self.heads, self.size, self.head_size),
            "key_radial": self.numbers(),
            "key_bias": self.numbers() if has_bias else None,
        }
        run(
            list_kernels.far_edge_gradients,
            (self.batch_heads * self.blocks,),
            inputs.query,
            inputs.key,
            *saved.scales,
            saved.share,
            inputs.bias,
            inputs.concentration,
            saved.entries,
            saved.starts,
            adjoint,
            start,
            saved.states,
            delta,
            *far.values(),
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(start),
            self.size,
            self.heads,
            self.blocks,
            self.first_entry,
            self.keep_walking,
            WALKED=self.walked,
            STATE=self.values,
            STEPS=options.steps,
            GROUP=self.group,
            CAUSAL=options.causal,
            LARGEST=torch.finfo(self.dtype).max,
            **self.lists,
            **self.heads_of,
            **self.edges,
            **self.listing("gradients"),
        )
        return far

    def edge_gradients(self, saved, cotangent, adjoint, start, local_delta, delta, far, gradients):
        inputs, options = self.inputs, self.options
        both = options.reversible or not options.causal
        tile = self.tile("edges")
        tiles = ceil_div(self.size, tile.rows)
        reach = (2 if both else 1) * self.edges["WINDOW"] + tile.rows
        span = (ceil_div(reach, tile.columns) + 1) * tile.columns
        edges = self.empty(*self.band(both))
        span_radial = self.empty(self.batch_heads, tiles, span, dtype=torch.float32)
        has_bias = inputs.bias is not None
        span_bias = torch.empty_like(span_radial) if has_bias else None
        query_bias = self.numbers() if far.get("entry_bias") is not None else None
        run(
            band_gradient_kernels.band_edge_gradients,
            self.grid(tile.rows),
            inputs.query,
            inputs.key,
            inputs.value,
            cotangent,
            *saved.scales,
            saved.share,
            inputs.bias,
            inputs.concentration,
            inputs.seed,
            saved.band,
            saved.lse,
            local_delta,
            delta,
            adjoint,
            start,
            saved.states,
            inputs.neighbors,
            far.get("entry_gradient"),
            far.get("entry_radial"),
            far.get("entry_bias"),
            edges,
            span_radial,
            span_bias,
            gradients.query,
            gradients.radial,
            query_bias,
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(inputs.value),
            *strides(cotangent),
            *strides(start),
            *strides(gradients.query),
            self.size,
            self.heads,
            self.batch_heads,
            tiles,
            self.logit_scale,
            self.keep_walking,
            self.kept_scale,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            SPAN=span,
            BREADTH=saved.band.shape[-1],
            EDGE_BREADTH=edges.shape[-1],
            STAGES=tile.stages,
            WALKED=self.walked,
            STATE=self.values,
            STEPS=options.steps,
            GROUP=self.group,
            SLOTS=self.slots,
            CAUSAL=options.causal,
            DROPPED=self.dropped,
            LARGEST=torch.finfo(self.dtype).max,
            **self.heads_of,
            **self.values_of,
            **self.edges,
            num_warps=tile.warps,
        )
        keys = self.tile("keys")
        run(
            band_gradient_kernels.key_gradients,
            self.grid(tile.rows),
            inputs.query,
            inputs.key,
            cotangent,
            *saved.scales,
            inputs.bias,
            inputs.seed,
            saved.lse,
            edges,
            span_radial,
            span_bias,
            far.get("key_gradient"),
            far.get("key_radial"),
            far.get("key_bias"),
            query_bias,
            gradients.bias,
            gradients.key,
            gradients.value,
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(cotangent),
            *strides(gradients.key),
            *strides(gradients.value),
            self.size,
            self.heads,
            self.batch_heads,
            tiles,
            self.logit_scale,
            self.kept_scale,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            SPAN=span,
            EDGE_BREADTH=edges.shape[-1],
            STAGES=keys.stages,
            WINDOW=self.edges["WINDOW"],
            CAUSAL=options.causal,
            BOTH=both,
            PADDED=inputs.padding_mask is not None,
            DROPPED=self.dropped,
            **self.heads_of,
            **self.values_of,
            num_warps=keys.warps,
        )
