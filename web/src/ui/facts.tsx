import type { Device } from "../engine/api";
import type { Facts as Known } from "./studio";
import { duration, median, megabytes, plural, sentence } from "./words";

/** Where and how fast it ran, and why there. */
export function Facts({ facts, device }: { facts: Known; device: Device | null }) {
  const { report, milliseconds, heapBytes } = facts;
  const place =
    report.backend === "webgpu" ? `WebGPU, ${report.precision}` : `WASM, ${plural(report.threads, "thread")}`;
  const compile = report.milliseconds.compile;
  return (
    <details class="facts">
      <summary>
        <span>{place}</span>
        {milliseconds && <small>{duration(milliseconds.total)}</small>}
      </summary>
      <table>
        <thead>
          <tr>
            <th scope="col">Network</th>
            <th scope="col">Prepared in</th>
            <th scope="col">Ran for</th>
          </tr>
        </thead>
        <tbody>
          <tr>
            <th scope="row">Text encoder</th>
            <td>{duration(compile.text_encoder)}</td>
            <td>{milliseconds ? duration(milliseconds.text) : "–"}</td>
          </tr>
          <tr>
            <th scope="row">UNet</th>
            <td>{duration(compile.unet)}</td>
            <td>
              {milliseconds ? `${milliseconds.steps.length} × ${duration(median(milliseconds.steps))}` : "–"}
            </td>
          </tr>
          <tr>
            <th scope="row">Decoder</th>
            <td>{duration(compile.decoder)}</td>
            <td>{milliseconds ? duration(milliseconds.decode) : "–"}</td>
          </tr>
        </tbody>
      </table>
      <p>
        Read in {duration(report.milliseconds.read)}
        {heapBytes ? `, ${megabytes(heapBytes)} of memory` : ""}
        {report.backend === "webgpu" && device?.adapter ? `, on ${device.adapter}` : ""}.
      </p>
      {report.notes.map((note) => (
        <p key={note}>{sentence(note)}</p>
      ))}
    </details>
  );
}
