/** The page with the engine of blots, from Vite's own server; with the embedded bundle, of which it reads the manifest. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createServer, type ViteDevServer } from "vite";

const BUNDLE = join(import.meta.dirname, "../../../src/pocketfusion/bundles/emoji");

/** Starts it; the address of the page is `ADDRESS` with `?plan=` and a `Plan` as JSON. */
export async function fakePage(): Promise<{ address: string; server: ViteDevServer }> {
  const listed = [{ path: "bundles/emoji/", name: "emoji64", target: "litert-cpu", model: null, sha256: "0", bytes: 39.5e6 }];
  const server = await createServer({
    root: join(import.meta.dirname, "../.."),
    configFile: false,
    logLevel: "error",
    server: { port: 0, host: "127.0.0.1", ws: false, hmr: false, watch: null },
    plugins: [
      {
        name: "bundles",
        configureServer: ({ middlewares }) => {
          middlewares.use("/tests/ui/bundles.json", (_, response) => void response.end(JSON.stringify({ bundles: listed })));
          middlewares.use("/tests/ui/bundles/emoji/", (request, response) => {
            response.end(readFileSync(join(BUNDLE, request.url ?? "")));
          });
        },
      },
    ],
  });
  await server.listen();
  return { address: `${server.resolvedUrls?.local[0]}tests/ui/fake.html`, server };
}
