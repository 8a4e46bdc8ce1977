"""Any encoder: load, probe, blocks and hidden states, cut; which layers read a parameter; the word pieces kept."""

import copy

import numpy as np
import torch
import torch.nn as nn
from transformers import AutoModel

from lib.hub import model_folder
from lib.messages import UserError, first_line


def blocks(encoder):
    """The encoder's nn.ModuleList of transformer blocks; layer k is block k - 1 of it."""
    count, found = getattr(encoder.config, "num_hidden_layers", None), {}
    for name, module in encoder.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and not name.startswith(tuple(found))
        ):
            found[f"{name}."] = module
    if len(found) != 1:
        raise UserError(
            f"{type(encoder).__name__} is no encoder that can be used here: it has {len(found)} lists of "
            f"{count} blocks, where BERT has one"
        )
    return next(iter(found.values()))


def hidden_states(encoder, batch):
    """All layers' states of a batch, embeddings first: a tuple of (B, T, D); and transformers' own output."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if (
        getattr(encoder.config, "type_vocab_size", 0) > 1
    ):  # XLM-R has one type, DistilBERT takes none
        inputs["token_type_ids"] = batch["token_type_ids"]
    output = encoder(**inputs, output_hidden_states=True)
    return output.hidden_states or (
        output.last_hidden_state,
    ), output  # no blocks: the embeddings alone


def probe_batch(encoder):
    """Two rows of nine tokens and four of padding, (2, 13), that differ in the last token alone."""
    pad = encoder.config.pad_token_id or 0
    row = [i for i in range(min(encoder.get_input_embeddings().num_embeddings, 30)) if i != pad][
        -9:
    ]
    rows = [row + [pad] * 4, [*row[:-1], row[0]] + [pad] * 4]
    ids = torch.tensor(rows, device=encoder.device)
    return {
        "input_ids": ids,
        "attention_mask": (ids != pad).long(),
        "token_type_ids": torch.zeros_like(ids),
    }


@torch.no_grad()
def probe(encoder):
    """The states of a small batch, dropout off: what an encoder is known by. UserError, with its class, where it is
    none that can be used here: its states are not those of its blocks, padding changes them, or the first token's do
    not see the last one."""
    mode, name, problem = encoder.training, type(encoder).__name__, None
    encoder.eval()
    try:
        batch = probe_batch(encoder)
        states = hidden_states(encoder, batch)[0]
        short = hidden_states(encoder, {key: value[:1, :9] for key, value in batch.items()})[0]
        if len(states) != len(blocks(encoder)) + 1:
            problem = f"gives {len(states)} hidden states for {len(blocks(encoder))} blocks"
        elif any(layer.shape != (2, 13, encoder.config.hidden_size) for layer in states):
            problem = "gives hidden states of other shapes than (rows, tokens, hidden size)"
        elif any(
            ((long[:1, :9] - alone).norm(dim=2) > 1e-4 * alone.norm(dim=2)).any()
            for long, alone in zip(states, short)
        ):  # kernels differ by 1e-6, approximations by 3e-4 or more
            problem = "gives other states where a row is padded"
        elif len(states) > 1 and torch.equal(states[-1][0, 0], states[-1][1, 0]):
            problem = "lets the first token not see the last one (it reads from left to right?)"
    except UserError:
        raise
    except Exception as error:  # whatever an unknown encoder wants: a language for each row, a decoder's input, ...
        problem = f"cannot be run on token ids and a mask alone ({first_line(error)})"
    finally:
        encoder.train(mode)
    if problem:
        raise UserError(f"{name} is no encoder that can be used here: it {problem}")
    return states


def check_layers(layers, count, flag):
    """UserError unless `layers` are different numbers from 0 to `count`."""
    wrong = [layer for layer in layers if not 0 <= layer <= count]
    if wrong:
        raise UserError(f"{flag} {wrong[0]}: the model has layers 0 (embeddings) to {count}")
    if len(set(layers)) < len(layers):
        raise UserError(f"{flag} {' '.join(map(str, layers))}: a layer is named twice")


def cut_after(encoder, layer):
    """Drop the blocks above `layer`: nothing that reads layers up to it can see the difference.

    Where something runs after the last block (a norm, in pre-norm encoders) it must not run after this layer: then one
    block more is kept, whose output nobody reads. What is left must be what its configuration builds, for it is saved.
    Returns how many blocks are left.
    """
    stack, expected, config = blocks(encoder), probe(encoder), encoder.config
    everything = list(stack)
    lists = {
        key: value
        for key, value in vars(config).items()  # with an entry for each block, as layer_types
        if isinstance(value, list) and len(value) == len(everything)
    }
    for count in dict.fromkeys((layer, min(layer + 1, len(everything)), len(everything))):
        del stack[:]
        stack.extend(everything[:count])
        config.num_hidden_layers = count  # DistilBERT's n_layers is an alias of it
        for key, value in lists.items():
            setattr(config, key, value[:count])
        try:
            built = type(encoder).from_pretrained(
                None, config=copy.deepcopy(config), state_dict=encoder.state_dict()
            )
            if all(
                map(
                    torch.equal,
                    2 * expected[: layer + 1],
                    probe(encoder)[: layer + 1] + probe(built)[: layer + 1],
                )
            ):
                return count
        except Exception:  # DeBERTa cannot run without a block
            continue
    raise UserError(
        f"{type(encoder).__name__} cannot be saved and loaded again with the same states"
    )


def parameter_layers(encoder, top):
    """Which layers up to `top` read each parameter, by name: {name: (first, last)}; those that none reads are left out.

    Those of block k are read by layer k, those that blocks share by all of theirs; of the others (embeddings, a
    projection beside them, relative positions, a last norm) the first reader is the lowest layer whose states depend on
    them, and, but for those of layer 0, all layers above may read them too.
    """
    batch, wanted, owner, readers = (
        probe_batch(encoder),
        [p.requires_grad for p in encoder.parameters()],
        {},
        {},
    )
    for k, block in enumerate(blocks(encoder), 1):
        owner |= {id(p): (owner.get(id(p), (k,))[0], k) for p in block.parameters()}
    for name, parameter in encoder.named_parameters():
        if id(parameter) not in owner:
            for other in encoder.parameters():
                other.requires_grad = other is parameter
            states = hidden_states(encoder, batch)[0]
            first = next((k for k, layer in enumerate(states) if layer.requires_grad), None)
            owner[id(parameter)] = (
                (first, top if first else 0) if first is not None else (top + 1, top + 1)
            )
        readers[name] = owner[id(parameter)]
    for parameter, before in zip(encoder.parameters(), wanted):
        parameter.requires_grad = before
    return {
        name: (first, min(last, top)) for name, (first, last) in readers.items() if first <= top
    }


def token_limit(encoder):
    """Tokens that a row may have: the table of positions less what padding takes of it, or what the config says."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name:
            return module.num_embeddings - (
                0 if module.padding_idx is None else module.padding_idx + 1
            )
    return max(getattr(encoder.config, "max_position_embeddings", 0), 0) or 1 << 20


def check_length(encoder, max_length):
    """UserError when rows of `max_length` tokens do not fit the encoder's positions."""
    limit = token_limit(encoder)
    if not 3 <= max_length <= limit:
        raise UserError(
            f"--max-length {max_length}: expected 3 to {limit}, the positions this encoder has"
        )


def check_tokens(encoder, ids):
    """UserError when a token id of an array is not in the encoder's table."""
    if ids.max() >= encoder.get_input_embeddings().num_embeddings:
        raise UserError(
            f"the tokenizer gives token {ids.max()}, the encoder knows "
            f"{encoder.get_input_embeddings().num_embeddings:,}: was resize_token_embeddings() forgotten?"
        )


def keep_tokens(encoder, ids, pad_id):
    """Keep only the rows of the word embeddings that the token `ids` use, and those up to [PAD], whose number stays.

    The others get no gradient and stay as they are; yet Adam, clipping and the gradient itself would go over all of
    them at every step. save_model() puts the rows back. Returns the new id of each old one, (V,) int32.
    """
    check_tokens(encoder, ids)
    table = encoder.get_input_embeddings()  # of any class: some scale what they look up
    used = np.zeros(table.num_embeddings, dtype=bool)
    used[ids] = True
    used[: max(pad_id, table.padding_idx or 0) + 1] = True
    encoder.kept_rows, encoder.whole_table = (
        torch.from_numpy(np.flatnonzero(used)),
        table.weight.detach().cpu(),
    )
    rows = encoder.whole_table[encoder.kept_rows].to(table.weight.device)
    table.weight, table.num_embeddings = nn.Parameter(rows, table.weight.requires_grad), len(rows)
    return (np.cumsum(used) - 1).astype(np.int32)


def whole_state(encoder):
    """The encoder's state_dict with all rows of the word embeddings."""
    state = encoder.state_dict()
    if hasattr(encoder, "whole_table"):
        table = encoder.get_input_embeddings().weight
        name = next(name for name, parameter in encoder.named_parameters() if parameter is table)
        state[name] = encoder.whole_table.index_copy(0, encoder.kept_rows, table.detach().cpu())
    return state


def load_encoder(name):
    """Load an encoder in float32, whatever its file holds.

    Reads safetensors alone and runs no code of the model's. Returns the encoder and whether it has a pretrained
    pooler. UserError when it cannot be had, lacks weights, or cannot be used: see probe().
    """
    folder = model_folder(name)
    try:
        encoder, info = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(
            f"no encoder can be loaded from {str(name)!r}: {first_line(error)}"
        ) from None
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        raise UserError(
            f"{str(name)!r} lacks weights of {type(encoder).__name__}: {(missing or ['wrong shapes'])[0]}"
        )
    probe(encoder)
    return encoder, getattr(encoder, "pooler", None) is not None and not info["missing_keys"]


def drop_pooler(encoder):
    """Take the pooler out of an encoder whose pooler nobody reads, so that none is trained, saved or counted."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = nn.Identity()  # and not None, which LayoutLM would call
