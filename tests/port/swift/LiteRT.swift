// Stands for LiteRT's Swift package: its public signatures (2.3.0) as far as the example calls them, and networks that
// answer with what `pocketfusion vectors` recorded, after comparing what they are given with it.
import Foundation

public enum Accelerator: Int32 { case none = 0, cpu = 1, gpu = 2, npu = 4 }

public enum LiteRtError: Error { case invalidArgument, runtimeFailure }

public final class Environment {
    public init() throws {}
}

public final class Options {
    var accelerators: Set<Accelerator> = []

    public init() throws {}

    public func setHardwareAccelerators(_ accelerators: Set<Accelerator>) throws { self.accelerators = accelerators }
}

public final class TensorBuffer {
    var bits: [UInt32] = []

    public func write<T>(_ data: [T]) throws {
        bits = data.withUnsafeBytes { bytes in
            (0..<bytes.count / 4).map { bytes.loadUnaligned(fromByteOffset: 4 * $0, as: UInt32.self) }
        }
    }

    public func read<T>() throws -> [T] { bits.map { Float(bitPattern: $0) as! T } }
}

public final class CompiledModel {
    nonisolated(unsafe) public static var kit = ""
    nonisolated(unsafe) public static var opened: [(String, Set<Accelerator>)] = []

    let network: String
    let names: [String]
    let inputs: [TensorBuffer]
    var call = 0

    public init(filePath: String, environment: Environment, options: Options? = nil) throws {
        network = URL(fileURLWithPath: filePath).deletingPathExtension().lastPathComponent
        let prefix = network + "."
        let files = try FileManager.default.contentsOfDirectory(atPath: Self.kit).sorted()
        let tensors = files.filter { $0.hasPrefix(prefix) && $0.hasSuffix(".npy") }.map { String($0.dropFirst(prefix.count).dropLast(4)) }
        names = tensors.filter { !["prompt_embeds", "noise_pred", "prev_sample", "image"].contains($0) }
        inputs = names.map { _ in TensorBuffer() }
        Self.opened.append((network, options!.accelerators))
    }

    public func createInputBuffers(signatureIndex: Int = 0) throws -> [TensorBuffer] { inputs }

    public func createOutputBuffers(signatureIndex: Int = 0) throws -> [TensorBuffer] { [TensorBuffer()] }

    public func inputName(inputIndex: Int, signatureIndex: Int = 0) throws -> String { names[inputIndex] }

    public func run(inputs: [TensorBuffer], outputs: [TensorBuffer], options: Options? = nil, signatureIndex: Int = 0) throws {
        for (name, buffer) in zip(names, inputs) {
            let wanted = Npy("\(Self.kit)/\(network).\(name).npy").call(call)
            precondition(buffer.bits == wanted, "call \(call) of the \(network): \(name) is not what was recorded")
        }
        let results = ["prompt_embeds", "noise_pred", "prev_sample", "image"].map { "\(Self.kit)/\(network).\($0).npy" }
        outputs[0].bits = Npy(results.first { FileManager.default.fileExists(atPath: $0) }!).call(call)
        call += 1
    }
}

/// A .npy file of 32-bit numbers, as their bits.
public struct Npy {
    public let calls: Int
    public let bits: [UInt32]

    public init(_ path: String) {
        let data = FileManager.default.contents(atPath: path)!
        let length = Int(data[8]) | Int(data[9]) << 8
        let header = String(decoding: data[10..<10 + length], as: UTF8.self)
        precondition(header.contains("'fortran_order': False") && (header.contains("'<f4'") || header.contains("'<i4'")))
        let shape = header.components(separatedBy: "(")[1].components(separatedBy: ")")[0].components(separatedBy: ",")
        calls = Int(shape[0].trimmingCharacters(in: .whitespaces))!
        bits = data.dropFirst(10 + length).withUnsafeBytes { bytes in
            (0..<bytes.count / 4).map { bytes.loadUnaligned(fromByteOffset: 4 * $0, as: UInt32.self) }
        }
    }

    func call(_ index: Int) -> [UInt32] { Array(bits[index * (bits.count / calls)..<(index + 1) * (bits.count / calls)]) }
}
