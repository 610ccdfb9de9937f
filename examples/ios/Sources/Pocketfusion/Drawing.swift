import Foundation
import LiteRT

/// A network of the bundle, by its name in the manifest. Inputs keep their values from run to run.
final class Network {
    private let spec: Json
    private let model: CompiledModel
    private let inputs: [String: TensorBuffer]
    private let order: [TensorBuffer]
    private let outputs: [TensorBuffer]

    init(folder: URL, manifest: Json, name: String, gpu: Bool, environment: Environment) throws {
        spec = manifest["networks"][name]
        let options = try Options()
        // half precision is all that this API gives a GPU; a network that needs more runs on the CPU
        let exact = spec["gpu_precision"].string == "fp32"
        try options.setHardwareAccelerators(gpu && !exact ? [.gpu, .cpu] : [.cpu])
        let file = folder.appendingPathComponent(manifest["files"][name]["path"].string)
        model = try CompiledModel(filePath: file.path, environment: environment, options: options)
        order = try model.createInputBuffers()
        outputs = try model.createOutputBuffers()
        var named: [String: TensorBuffer] = [:]
        for (index, buffer) in order.enumerated() { named[try model.inputName(inputIndex: index)] = buffer }
        inputs = named
    }

    /// The extents of an input; none if the network lacks it.
    func shape(_ input: String) -> [Int] {
        let found = spec["inputs"].items.first { $0["name"].string == input }
        return found.map { $0["shape"].items.map(\.int) } ?? []
    }

    func write<T>(_ input: String, _ values: [T]) throws {
        guard let buffer = inputs[input] else { throw PocketfusionError.bundle("a network has no input \(input)") }
        try buffer.write(values)
    }

    func run() throws -> [Float] {
        try model.run(inputs: order, outputs: outputs)
        return try outputs[0].read()
    }
}

/// A picture: RGB, rows from the top.
public struct Picture {
    public let width, height: Int
    public let rgb: [UInt8]
}

/// Draws with the bundle in `folder`, on the GPU with one of `--target litert-gpu`, else on the CPU.
///
/// The UNet stays in memory; the text encoder goes before the first step, the decoder comes after the last. One picture
/// at a time, off the main thread. The pictures on the CPU are `pocketfusion generate`'s for the same seed.
public final class Drawing {
    private let folder: URL
    private let manifest: Json
    private let environment: Environment
    private let tokenizer: Tokenizer
    private let unet: Network
    private let gpu: Bool

    /// `unicode` is the file unicode.json of `pocketfusion vectors`.
    public init(folder: URL, unicode: URL) throws {
        self.folder = folder
        manifest = try Json.read(folder.appendingPathComponent("bundle.json"))
        gpu = manifest["target"].string == "litert-gpu"
        environment = try Environment()
        let file = folder.appendingPathComponent(manifest["files"]["tokenizer"]["path"].string)
        let tables = CodePoints(try Json.read(unicode))
        tokenizer = Tokenizer(try Json.read(file), spec: manifest["tokenizer"], unicode: tables)
        unet = try Network(folder: folder, manifest: manifest, name: "unet", gpu: gpu, environment: environment)
    }

    private func network(_ name: String) throws -> Network {
        try Network(folder: folder, manifest: manifest, name: name, gpu: gpu, environment: environment)
    }

    /// `progress` is given the steps done and their number.
    public func draw(_ prompt: String, seed: UInt64, progress: (Int, Int) -> Void = { _, _ in }) throws -> Picture {
        let texts = try self.texts(prompt)
        let latents = try denoise(texts, seed: seed, progress: progress)
        return try decode(latents)
    }

    /// The text encoder's states: of the empty prompt, where guidance asks for it, and of the prompt.
    private func texts(_ prompt: String) throws -> [[Float]] {
        let encoder = try network("text_encoder")  // freed at the end of this function
        func encode(_ text: String) throws -> [Float] {
            let tokens = tokenizer.encode(text)
            try encoder.write("input_ids", tokens.ids)
            try encoder.write("attention_mask", tokens.mask)
            return try encoder.run()
        }
        var texts: [[Float]] = []
        let guidance = manifest["guidance"]
        if guidance.isNull || guidance.string == "classifier-free" {  // else embedded or folded: one prediction a step
            let kept = manifest["files"]["empty_prompt_embeds"]["path"]
            texts.append(kept.isNull ? try encode("") : try floats(folder.appendingPathComponent(kept.string)))
        }
        texts.append(try encode(prompt))
        return texts
    }

    private func denoise(_ texts: [[Float]], seed: UInt64, progress: (Int, Int) -> Void) throws -> [Float] {
        let defaults = manifest["defaults"]
        let asked = defaults["guidance_scale"].double!
        let scale = max(asked, 1)  // up to 1: no guidance
        let count = defaults["num_inference_steps"].int
        let sampler = manifest["sampler"].isNull ? "ddim" : manifest["sampler"].string
        let schedule = try Schedule(manifest["scheduler"], sampler: sampler, count: count)
        let size = ["height", "width", "channels"].map { manifest["latents"][$0].int }.reduce(1, *)
        let batch = unet.shape("encoder_hidden_states")[0]
        let folded = !unet.shape("step_coefficients").isEmpty
        // one call a step for both rows of text, or for each where the UNet takes one row
        let calls = batch == 2 ? [texts[0] + texts[1]] : scale > 1 ? texts : [texts.last!]
        try unet.write("encoder_hidden_states", calls[0])
        if let dim = unet.shape("timestep_cond").last { try unet.write("timestep_cond", guidanceEmbedding(asked, dim)) }

        var noise = Noise(seed: seed)
        var sample = noise.draw(size).map { $0 * Float(schedule.initialScale) }
        var previous: [Float]?  // x_0 of the step before, for samplers that look at it again
        let epsilon = manifest["scheduler"]["prediction_type"].string == "epsilon"
        for (k, step) in schedule.steps.enumerated() {
            if unet.shape("timestep_embedding").isEmpty {
                try unet.write("timestep", [Float](repeating: Float(step.timestep), count: batch))
            } else {
                let row = timestepEmbedding(step.timestep, manifest["time_embedding"])
                try unet.write("timestep_embedding", Array([[Float]](repeating: row, count: batch).joined()))
            }
            let (a, b) = (Float(step.a), Float(step.b))
            if folded {
                try unet.write("sample", sample)
                try unet.write("step_coefficients", [Float(scale), a, b])
                sample = try unet.run()
            } else {
                try unet.write("sample", Array([[Float]](repeating: sample, count: batch).joined()))
                var rows: [Float] = []
                for text in calls {
                    if calls.count > 1 { try unet.write("encoder_hidden_states", text) }
                    rows += try unet.run()
                }
                var output = Array(rows.suffix(size))
                if rows.count == 2 * size, scale > 1 {
                    for i in 0..<size {
                        let difference = (output[i] - rows[i]) * Float(scale)
                        output[i] = difference + rows[i]
                    }
                }
                let (alpha, sigma, before) = (Float(step.alpha), Float(step.sigma), Float(step.previous))
                var after = sample
                for i in 0..<size {
                    let (kept, added) = (a * sample[i], b * output[i])
                    after[i] = kept + added
                    if before != 0, let previous {
                        let more = before * previous[i]
                        after[i] += more
                    }
                }
                previous = (0..<size).map { i in
                    let part = sigma * output[i]
                    if epsilon { return (sample[i] - part) / alpha }
                    let whole = alpha * sample[i]
                    return whole - part
                }
                sample = after
            }
            if step.noise != 0 {
                let fresh = noise.draw(size).map { Float(step.noise) * $0 }
                for i in 0..<size { sample[i] += fresh[i] }
            }
            progress(k + 1, count)
        }
        return sample
    }

    private func decode(_ latents: [Float]) throws -> Picture {
        let decoder = try network("decoder")
        guard decoder.shape("latents").reduce(1, *) == latents.count else {
            throw PocketfusionError.bundle("the decoder takes tiles: export without --tile")
        }
        try decoder.write("latents", latents)
        let rgb = try decoder.run().map { x in
            UInt8((min(max(x / 2 + 0.5, 0), 1) * 255).rounded(.toNearestOrEven))
        }
        return Picture(width: manifest["image"]["width"].int, height: manifest["image"]["height"].int, rgb: rgb)
    }

    private func floats(_ file: URL) throws -> [Float] {  // little-endian, as every iPhone is
        let data = try Data(contentsOf: file)
        return data.withUnsafeBytes { bytes in
            (0..<bytes.count / 4).map { bytes.loadUnaligned(fromByteOffset: 4 * $0, as: Float.self) }
        }
    }
}
