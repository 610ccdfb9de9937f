#if canImport(SwiftUI)
import SwiftUI

/// One screen: a prompt, a button, progress, the picture. The bundle's folder lies in the app as `bundle`, a folder
/// reference, beside unicode.json.
public struct DrawingView: View {
    @State private var prompt = "a red apple"
    @State private var done: Double?  // of 1, while it draws
    @State private var image: CGImage?
    @State private var failure: String?
    @State private var drawing: Drawing?

    public init() {}

    public var body: some View {
        VStack(spacing: 12) {
            TextField("Prompt", text: $prompt).textFieldStyle(.roundedBorder)
            Button("Draw") { Task { await draw() } }.disabled(done != nil)
            if let done { ProgressView(value: done) }
            if let failure { Text(failure) }
            if let image { Image(decorative: image, scale: 1).resizable().scaledToFit() }
            Spacer()
        }
        .padding()
    }

    @MainActor private func draw() async {
        done = 0
        failure = nil
        defer { done = nil }
        let (prompt, kept) = (prompt, drawing)
        do {
            let (made, picture) = try await Task.detached {
                let drawing = try kept ?? Self.open()
                let seed = UInt64.random(in: 0..<1 << 32)
                let picture = try drawing.draw(prompt, seed: seed) { step, steps in
                    Task { @MainActor in if done != nil { done = Double(step) / Double(steps) } }
                }
                return (drawing, picture)
            }.value
            drawing = made
            image = picture.cgImage
        } catch {
            failure = "\(error)"
        }
    }

    private static func open() throws -> Drawing {
        guard let folder = Bundle.main.url(forResource: "bundle", withExtension: nil),
            let unicode = Bundle.main.url(forResource: "unicode", withExtension: "json")
        else { throw CocoaError(.fileNoSuchFile) }
        return try Drawing(folder: folder, unicode: unicode)
    }
}

extension Picture {
    var cgImage: CGImage? {
        guard let provider = CGDataProvider(data: Data(rgb) as CFData) else { return nil }
        return CGImage(
            width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 24, bytesPerRow: 3 * width,
            space: CGColorSpaceCreateDeviceRGB(), bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.none.rawValue),
            provider: provider, decode: nil, shouldInterpolate: false, intent: .defaultIntent)
    }
}
#endif
