/**
 * Noise of a seed, equal to numpy's bit for bit: `Generator(PCG64(seed)).standard_normal(…, float32)`.
 *
 * PCG64 is O'Neill's XSL-RR 128/64 (HMC-CS-2014-0905), seeded through O'Neill's seed_seq as numpy's SeedSequence has it;
 * normal numbers are Marsaglia & Tsang's ziggurat (J. Stat. Software 5(8), 2000) of 256 layers in float32.
 */

const MASK128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/** Standard normal numbers of a seed, float32, one after the other. */
export class NoiseStream {
  private state: bigint;
  private readonly increment: bigint;
  private spare: number | null = null; // the upper half of the last 64 bits

  /** `seed` is a whole number from 0. */
  constructor(seed: number | bigint) {
    const words = seedWords(BigInt(seed));
    const [high, low, sequenceHigh, sequenceLow] = [0, 2, 4, 6].map((i) => (BigInt(words[i + 1]) << 32n) | BigInt(words[i]));
    this.increment = (((sequenceHigh << 64n) | sequenceLow) << 1n | 1n) & MASK128;
    this.state = (this.increment + ((high << 64n) | low)) & MASK128;
    this.advance();
  }

  /** The next `count` numbers. */
  draw(count: number): Float32Array<ArrayBuffer> {
    const numbers = new Float32Array(count);
    for (let i = 0; i < count; i++) numbers[i] = this.normal();
    return numbers;
  }

  private advance(): void {
    this.state = (this.state * MULTIPLIER + this.increment) & MASK128;
  }

  private uint32(): number {
    if (this.spare !== null) {
      const value = this.spare;
      this.spare = null;
      return value;
    }
    this.advance();
    const folded = BigInt.asUintN(64, (this.state >> 64n) ^ this.state);
    const turn = this.state >> 122n;
    const value = BigInt.asUintN(64, (folded >> turn) | (folded << ((64n - turn) & 63n)));
    this.spare = Number(value >> 32n);
    return Number(value & 0xffffffffn);
  }

  private uniform(): number {
    return (this.uint32() >>> 8) / 16_777_216;
  }

  private normal(): number {
    for (;;) {
      const bits = this.uint32();
      const layer = bits & 0xff;
      const size = (bits >>> 9) & 0x7fffff;
      const x = Math.fround(size * WIDTH[layer]) * (bits & 0x100 ? -1 : 1);
      if (size < INSIDE[layer]) return x;
      if (layer === 0) return this.tail(size);
      const between = Math.fround(Math.fround(HEIGHT[layer - 1] - HEIGHT[layer]) * this.uniform());
      if (Math.fround(between + HEIGHT[layer]) < Math.exp(-0.5 * x * x)) return x;
    }
  }

  /** Beyond the lowest layer (Marsaglia, 1964). log1p is rounded right; a C library's may be off by its last bit. */
  private tail(size: number): number {
    for (;;) {
      const x = Math.fround(INVERSE_EDGE * -Math.fround(Math.log1p(-this.uniform())));
      const y = -Math.fround(Math.log1p(-this.uniform()));
      if (Math.fround(y + y) > Math.fround(x * x)) {
        return Math.fround(Math.fround(EDGE) + x) * ((size >>> 8) & 1 ? -1 : 1);
      }
    }
  }
}

const EDGE = 3.6541528853610088;
const AREA = 0.00492867323399; // of each layer
const INVERSE_EDGE = Math.fround(1 / EDGE);
const [WIDTH, HEIGHT, INSIDE] = ziggurat();

/** By layer: a unit's width, the density at its edge, and the units that surely lie inside. */
function ziggurat(): [Float32Array, Float32Array, Uint32Array] {
  const units = 2 ** 23;
  const [width, height, inside] = [new Float32Array(256), new Float32Array(256), new Uint32Array(256)];
  const density = (x: number) => Math.exp(-0.5 * x * x);
  const base = AREA / density(EDGE);
  inside[0] = Math.round((EDGE / base) * units);
  [width[0], width[255]] = [base / units, EDGE / units];
  [height[0], height[255]] = [1, density(EDGE)];
  for (let i = 254, edge = EDGE, before = EDGE; i >= 1; i--, before = edge) {
    edge = Math.sqrt(-2 * Math.log(AREA / edge + density(edge)));
    inside[i + 1] = Math.round((edge / before) * units);
    [width[i], height[i]] = [edge / units, density(edge)];
  }
  return [width, height, inside];
}

/** Eight words of SeedSequence(seed).generate_state. */
function seedWords(seed: bigint): number[] {
  const entropy: number[] = [];
  do {
    entropy.push(Number(seed & 0xffffffffn));
    seed >>= 32n;
  } while (seed > 0n);
  const pool = [0, 0, 0, 0];
  let constant = 0x43b0d7e5;
  const hash = (value: number): number => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
  const mix = (x: number, y: number): number => {
    const value = Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715);
    return value ^ (value >>> 16);
  };
  for (let i = 0; i < 4; i++) pool[i] = hash(entropy[i] ?? 0);
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  }
  for (const word of entropy.slice(4)) for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(word));
  let last = 0x8b51f9dd;
  return Array.from({ length: 8 }, (_, i) => {
    let value = pool[i % 4] ^ last;
    last = Math.imul(last, 0x58f38ded);
    value = Math.imul(value, last);
    return (value ^ (value >>> 16)) >>> 0;
  });
}
