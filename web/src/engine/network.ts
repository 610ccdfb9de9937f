/** One network of a bundle in LiteRT.js. Inputs keep their values from run to run; every tensor is freed by hand. */

import { type CompiledModel, Tensor } from "@litertjs/core";
import { elements, type Network as Spec } from "./manifest";

type Values = Float32Array<ArrayBuffer> | Int32Array<ArrayBuffer>;

/** What draws needs of a network. */
export interface Network {
  readonly spec: Spec;
  /** Copies `values` into the input `name`, of the manifest's shape. */
  write(name: string, values: Values): void;
  /** Computes; the output's values are a copy. */
  run(): Promise<Float32Array<ArrayBuffer>>;
}

export class LiteRtNetwork implements Network {
  private readonly inputs = new Map<string, Tensor>();

  constructor(
    private readonly model: CompiledModel,
    readonly spec: Spec,
  ) {}

  write(name: string, values: Values): void {
    const shape = this.spec.inputs.find((tensor) => tensor.name === name)?.shape ?? [];
    if (values.length !== elements(shape)) throw new Error(`${name} has ${values.length} values for [${shape}]`);
    this.inputs.get(name)?.delete();
    this.inputs.set(name, new Tensor(values, [...shape]));
  }

  async run(): Promise<Float32Array<ArrayBuffer>> {
    const outputs = await this.model.run(Object.fromEntries(this.inputs));
    try {
      return (await outputs[this.spec.outputs[0].name].data()) as Float32Array<ArrayBuffer>;
    } finally {
      for (const tensor of Object.values(outputs)) tensor.delete();
    }
  }

  close(): void {
    for (const tensor of this.inputs.values()) tensor.delete();
    this.model.delete();
  }
}
