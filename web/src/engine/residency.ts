/**
 * Which of a bundle's networks are in memory, and when: all of them, or in turns where they do not fit together.
 *
 * LiteRT.js' heap ends at 2 GiB. It holds a network's file, and beside it the weights as the kernels take them; what a
 * network that was freed leaves is used again by the next (measured: docs/browser-engine.md).
 */

import type { Backend, NetworkName } from "./api";
import { BundleError } from "./errors";
import type { Manifest } from "./manifest";
import type { LiteRtNetwork, Network } from "./network";

const HEAP_LIMIT = 2 ** 31;
/** Of LiteRT's code and its stacks. */
const HEAP_BASE = 20e6;
/** Of the heap that weights may take; the rest is for activations. */
const SHARE = 0.75;

/** Lends networks for a piece of work. */
export interface Residency {
  /** If there is one network in memory at a time, so that work is best done in few turns. */
  readonly inTurns: boolean;
  use<Result>(name: NetworkName, work: (network: Network) => Promise<Result>): Promise<Result>;
}

/** All networks, always. */
export class Resident implements Residency {
  readonly inTurns = false;

  constructor(private readonly networks: Record<NetworkName, Network>) {}

  async use<Result>(name: NetworkName, work: (network: Network) => Promise<Result>): Promise<Result> {
    return await work(this.networks[name]);
  }
}

/** One at a time: loaded for its work and freed after it. */
export class InTurns implements Residency {
  readonly inTurns = true;

  constructor(private readonly load: (name: NetworkName) => Promise<LiteRtNetwork>) {}

  async use<Result>(name: NetworkName, work: (network: Network) => Promise<Result>): Promise<Result> {
    const network = await this.load(name);
    try {
      return await work(network);
    } finally {
      network.close();
    }
  }
}

/** If the networks fit into memory together; throws BundleError "too-large" if not even the largest does alone. */
export function fitTogether({ networks, files, target }: Manifest, backend: Backend): boolean {
  const needs = Object.entries(networks).map(([name, spec]) => {
    // kernels take 8-bit weights as they are, but for those behind a DEQUANTIZE, which bundles for GPUs do not have
    const whole = spec.weights.endsWith("dynamic") || (spec.weights === "int8" && target === "litert-gpu");
    // on a GPU the kernels' weights are in its memory
    const unpacked = backend === "wasm" ? spec.parameters * (whole ? 1 : 4) : 0;
    return files[name].size + unpacked;
  });
  const largest = HEAP_BASE + Math.max(...needs);
  if (largest > HEAP_LIMIT) {
    const [need, limit] = [largest, HEAP_LIMIT].map((bytes) => Math.round(bytes / 1e6).toLocaleString("en"));
    throw new BundleError(
      "too-large",
      `the bundle needs ${need} MB of memory and LiteRT has ${limit} MB in a browser: export it with int8-dynamic weights`,
    );
  }
  return HEAP_BASE + needs.reduce((sum, need) => sum + need, 0) <= SHARE * HEAP_LIMIT;
}
