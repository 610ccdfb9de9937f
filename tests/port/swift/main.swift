// The example's Swift against a port kit: CHECK BUNDLE KIT TOKENIZERS says "good", or fails.
import Foundation
import LiteRT

let arguments = CommandLine.arguments
let (bundle, kit, more) = (URL(fileURLWithPath: arguments[1]), URL(fileURLWithPath: arguments[2]), URL(fileURLWithPath: arguments[3]))

func at(_ folder: URL, _ name: String) -> URL { folder.appendingPathComponent(name) }

func tokens(_ tokenizer: URL, _ spec: Json, _ unicode: CodePoints, _ rows: URL) throws {
    let ours = Tokenizer(try Json.read(tokenizer), spec: spec, unicode: unicode)
    for row in try Json.read(rows).items {
        let made = ours.encode(row["prompt"].string)
        precondition(
            made.ids == row["ids"].items.map { Int32($0.int) } && made.count == row["count"].int,
            "\(tokenizer.path): \(row["prompt"].string)")
    }
}

let index = try Json.read(at(kit, "vectors.json"))
let manifest = try Json.read(at(bundle, "bundle.json"))
let unicode = CodePoints(try Json.read(at(kit, "unicode.json")))
try tokens(at(bundle, "tokenizer.json"), manifest["tokenizer"], unicode, at(kit, "tokens.json"))
for name in try FileManager.default.contentsOfDirectory(atPath: more.path).sorted() {
    let folder = at(more, name)
    try tokens(at(folder, "tokenizer.json"), Json.read(at(folder, "spec.json")), unicode, at(folder, "tokens.json"))
}
for (seed, name) in index["noise"].fields {
    let wanted = Npy(at(kit, name.string).path).bits
    var noise = Noise(seed: UInt64(String(decoding: seed, as: UTF8.self))!)
    for (i, x) in noise.draw(wanted.count).enumerated() {
        // beyond the ziggurat's edge a C library's float32 log1p may be off by its last bit
        precondition(x.bitPattern == wanted[i] || abs(x) > 3.654, "noise \(i)")
    }
}
for table in try Json.read(at(kit, "samplers.json")).items {
    let name = table["sampler"].string
    let schedule = try Schedule(manifest["scheduler"], sampler: name, count: table["steps"].int, eta: table["eta"].double)
    for (k, step) in schedule.steps.enumerated() {
        for (ours, wanted) in [
            (step.timestep, table["timesteps"][k]), (step.noise, table["noise"][k]),
            (step.previous, table["previous_x_0"][k]), (step.a, table["ab"][k][0]), (step.b, table["ab"][k][1]),
        ] { precondition(abs(ours - wanted.double!) < 1e-9, "\(name) step \(k)") }
        if !table["timestep_embedding"].isNull {
            let wanted = table["timestep_embedding"][k].items.map { Float($0.double!) }
            precondition(timestepEmbedding(step.timestep, manifest["time_embedding"]) == wanted, "the embedding of time")
        }
    }
    if !table["timestep_cond"].isNull {
        let wanted = table["timestep_cond"].items.map { Float($0.double!) }
        let scale = manifest["defaults"]["guidance_scale"].double!
        precondition(guidanceEmbedding(scale, wanted.count) == wanted, "the embedding of guidance")
    }
}
// a whole picture: the networks are recorded ones, which compare every input bit for bit
CompiledModel.kit = kit.path
var steps = 0
let drawing = try Drawing(folder: bundle, unicode: at(kit, "unicode.json"))
let picture = try drawing.draw(index["picture"]["prompt"].string, seed: UInt64(index["picture"]["seed"].int)) { done, _ in
    steps = done
}
let pixels = try Data(contentsOf: at(kit, "pixels.npy")).suffix(3 * picture.width * picture.height)
precondition(picture.rgb == Array(pixels) && steps == index["picture"]["num_inference_steps"].int)
let gpu = manifest["target"].string == "litert-gpu"
for (name, accelerators) in CompiledModel.opened {
    let exact = manifest["networks"][name]["gpu_precision"].string == "fp32"
    precondition(accelerators == (gpu && !exact ? [.gpu, .cpu] : [.cpu]), name)
}
print("good")
