import { render } from "preact";
import { Engine, probe } from "../engine/api";
import { App } from "./app";
import { startOffline } from "./offline";
import "./style.css";

const ready = startOffline();
// where the page comes again through its service worker, this one has nothing to begin
void Promise.race([ready, new Promise((resolve) => setTimeout(resolve, crossOriginIsolated ? 0 : 300))]).then(() => {
  const root = document.getElementById("app") as HTMLElement;
  root.replaceChildren();
  render(<App engine={new Engine({ wasm: "wasm/" })} probe={probe} ready={ready} />, root);
});
