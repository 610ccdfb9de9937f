/** The engine without a page around it: its interface as `window.engine`, for tests in a browser. */

import * as engine from "../../src/engine/api";

Object.assign(window, { engine });
